Feature: The same seed gives the same bytes [MVP-042, MVP-081]

  Scenario: Twice the same seed, with other work between
    Given an engine
    And a llorch that tests its engine
    When I run a task with seed 42
    And I run a task without a seed
    And I run a task with seed 42 again
    Then both gave the same bytes
    And the engine had no cache and no company for them

  Scenario: An engine that heeds no seed is found out
    Given an engine that heeds no seed
    And a llorch that tests its engine
    Then the pool's determinism is failed
    When I hand in a task with seed 42
    Then it is refused with 409 DETERMINISM_UNAVAILABLE
    And the refusal says how llama-server has to be started
    When I run a task without a seed
    Then it has completed
