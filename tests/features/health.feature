Feature: How a pool is [MVP-041]

  Scenario: A pool that is ready
    Given an engine
    And a llorch
    Then the pool is live and ready
    And it has 2 slots, all free, and nothing waits
    And its engine is "llamacpp" of version "b4242-fake"

  Scenario: The model is still loading
    Given an engine that is loading its model
    And a llorch
    Then the pool is live but not ready
    When I hand in a task
    Then it is refused with 503 POOL_UNREADY
    When the engine has loaded its model
    Then the pool becomes ready

  Scenario: The engine dies under a task, and comes back
    Given an engine with one slot, which says what it is told
    And a llorch with room for one waiting task
    And a task that runs
    And an open stream that has shown "Hello"
    When the engine is killed
    Then the open stream shows the error WORKER_RESET, which is retriable
    And the pool becomes unready, and says why
    When the engine is started again
    Then the pool becomes ready
