Feature: Who may ask

  Background:
    Given an engine

  Scenario: On loopback, the token is optional if the configuration says so
    Given a llorch on 127.0.0.1 with a token, optional on loopback
    When I hand in a task without a token
    Then it is admitted at place 0
    And the log has it from "localhost"

  Scenario: On loopback, a token that is set is required
    Given a llorch on 127.0.0.1 with a token
    When I hand in a task without a token
    Then it is refused with 401 MISSING_TOKEN
    And the engine was never asked

  Scenario: Beyond loopback, there is no start without a token [MVP-011]
    When I start a llorch on 0.0.0.0 without a token
    Then it ends with exit code 78
    And it says NON_LOOPBACK_WITHOUT_TOKEN in one line

  Scenario: A wrong token [MVP-060, MVP-061]
    Given a llorch on 0.0.0.0 with a token
    When I hand in a task with a wrong token
    Then it is refused with 401 BAD_TOKEN
    And the engine was never asked

  Scenario: The right token, and its identity in the log [MVP-060]
    Given a llorch on 0.0.0.0 with a token
    When I hand in a task with the right token
    Then it is admitted at place 0
    And the log has it from the token's fingerprint
    And the log never has the token itself

  Scenario: A missing token [MVP-060, MVP-061]
    Given a llorch on 0.0.0.0 with a token
    When I hand in a task without a token
    Then it is refused with 401 MISSING_TOKEN
    And the refusal asks for a bearer token
    And the engine was never asked
