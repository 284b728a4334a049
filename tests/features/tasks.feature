Feature: A task, from its admission to its end

  Background:
    Given an engine with one slot, which says what it is told
    And a llorch with room for one waiting task

  Scenario: A task is admitted, streamed and done [MVP-030, MVP-033]
    When I hand in a task
    Then it is admitted at place 0
    When the engine says "Hello" and then " there"
    And the engine is done
    Then its stream is: started, token, token, end
    And its text is "Hello there"

  Scenario: A waiting task is cancelled before its turn [MVP-032]
    Given a task that runs
    And a task that waits
    When I cancel the task that waits
    Then its stream is: started, end
    And its end says cancelled after 0 tokens
    When the engine is done
    Then the task that runs has completed
    And the engine was asked for one task only

  Scenario: A running task is cancelled in mid-stream [MVP-032]
    Given a task that runs
    And an open stream that has shown "Hello"
    When I cancel the task that runs
    Then the engine's work is broken off
    And the open stream shows nothing but the end
    And its stream is: started, end
    And its end says cancelled after 1 tokens
    And the slot comes back

  Scenario: The queue is full [MVP-031]
    Given a task that runs
    And a task that waits
    When I hand in a task
    Then it is refused with 429 ADMISSION_REJECT
    And the refusal is retriable, by the policy reject
    And body and headers say the same backoff
    When I cancel the task that waits
    And I hand in a task
    Then it is admitted at place 0
