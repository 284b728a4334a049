"""The JSON of requests and answers: what a body may say, in which words it is refused, and what is shown."""

import json
import math
from datetime import UTC, datetime
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch import wire
from llorch.errors import (
    BodyTooLarge,
    ContextOverflow,
    DeterminismUnavailable,
    ForbiddenHost,
    InternalError,
    InvalidParams,
    LlorchError,
    MissingToken,
    PoolUnready,
    QueueFull,
    TaskNotFound,
    TooManyStreams,
)
from llorch.events import Error
from llorch.task import Message, Sampling, State, Task, TaskRequest
from llorch.wire import TaskBody

CEILING = 4096
FIELDS = [field.name for field in msgspec.structs.fields(TaskBody)]
KIB_64 = 64 * 1024


def request(body: Any, *, max_tokens: int = CEILING) -> TaskRequest:
    """What `body` asks for: bytes as they are, anything else as JSON."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return wire.task_request(body, max_tokens=max_tokens)


def asked(**fields: Any) -> TaskRequest:
    """What a good prompt with `fields` asks for."""
    return request({"prompt": "hello", **fields})


def refused(body: Any) -> str:
    """The message of the 400 for `body`."""
    with pytest.raises(InvalidParams) as error:
        request(body)
    is_told(error.value.message)
    return error.value.message


def is_told(message: str) -> None:
    """It begins with a path, is text, and is never long."""
    assert message.startswith("$")
    assert len(message.encode()) <= 1000


def refusal(**fields: Any) -> str:
    """The message of the 400 for a good prompt with `fields`."""
    return refused({"prompt": "hello", **fields})


# -- the ranges ------------------------------------------------------------------------------------

RANGES = [
    ("max_tokens", 1, CEILING),
    ("seed", 0, 2**32 - 2),
    ("temperature", 0, 5),
    ("top_k", 0, 1000),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("typical_p", 0, 1),
    ("repeat_penalty", 0.5, 2),
    ("repeat_last_n", 0, 4096),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
]
INTEGERS = {"max_tokens", "seed", "top_k", "repeat_last_n"}


def test_every_number_has_its_range_here() -> None:
    """No numeric field is left out of the table above."""
    numeric = {name for name, hint in TaskBody.__annotations__.items() if {int, float} & {*leaves(hint)}}
    assert numeric == {name for name, _, _ in RANGES}


def leaves(hint: Any) -> list[Any]:
    """The types that an annotation is made of."""
    return [leaf for part in get_args(hint) for leaf in leaves(part)] or [hint]


@pytest.mark.parametrize(("field", "low", "high"), RANGES)
def test_both_edges_of_a_range_are_accepted(field: str, low: float, high: float) -> None:
    """The least and the greatest value arrive as they were given [T12]."""
    for value in (low, high):
        request = asked(**{field: value})
        holder = request if field == "max_tokens" else request.sampling
        assert getattr(holder, field) == value


@pytest.mark.parametrize(("field", "low", "high"), RANGES)
def test_a_step_beyond_a_range_is_refused(field: str, low: float, high: float) -> None:
    """The engine would coerce it silently; the message names the field and the bound [T12]."""
    if field in INTEGERS:
        under, over = low - 1, high + 1
    else:
        under, over = math.nextafter(low, -math.inf), math.nextafter(high, math.inf)
    assert refusal(**{field: under}).startswith(f"$.{field}: expected ")
    assert f">= {low}" in refusal(**{field: under})
    assert f"<= {high}" in refusal(**{field: over})
    for bomb in (-1e308, 1e308, 10**400, -(10**400)):
        assert refusal(**{field: bomb}).startswith(f"$.{field}: ")


@pytest.mark.parametrize("field", sorted(INTEGERS))
@pytest.mark.parametrize("value", [1.0, 1.5, "1", True, [1], {}])
def test_an_integer_is_an_integer(field: str, value: Any) -> None:
    """1.0 is none, nor is what merely looks like one [T12]."""
    assert refusal(**{field: value}).startswith(f"$.{field}: expected int, got ")


@pytest.mark.parametrize("field", sorted({name for name, _, _ in RANGES} - INTEGERS))
@pytest.mark.parametrize("value", ["1", True, [1], {}])
def test_a_number_is_a_number(field: str, value: Any) -> None:
    """An integer will do, a text or a truth will not [T12]."""
    assert refusal(**{field: value}).startswith(f"$.{field}: expected float, got ")
    assert asked(**{field: 1})


def test_the_ceiling_of_max_tokens_is_the_configured_one() -> None:
    """And the message says which key that is."""
    assert request({"prompt": "x", "max_tokens": 7}, max_tokens=7).max_tokens == 7
    with pytest.raises(InvalidParams, match=r"^\$\.max_tokens: expected int <= 7 \(limits\.max_tokens\)$"):
        request({"prompt": "x", "max_tokens": 8}, max_tokens=7)


# -- texts, lists and tables -----------------------------------------------------------------------

SIZES = [  # a field's value of n bytes, the most bytes, where the fault is
    (lambda text: {"stop": ["ok", text]}, 128, "$.stop[1]"),
    (lambda text: {"grammar": text}, KIB_64, "$.grammar"),
    (lambda text: {"session_id": text}, 128, "$.session_id"),
    (lambda text: {"metadata": {text: "v"}}, 64, "$.metadata: a key"),
    (lambda text: {"metadata": {"k": text}}, 512, "$.metadata['k']"),
    (lambda text: {"json_schema": {"a": text[8:]}}, KIB_64, "$.json_schema"),  # with {"a":""} around it
]


@pytest.mark.parametrize(("fields", "most", "path"), SIZES, ids=[size[2] for size in SIZES])
@pytest.mark.parametrize("character", ["a", "é", "\U0001f600"])
def test_a_text_is_bounded_in_bytes(fields: Any, most: int, path: str, character: str) -> None:
    """As many bytes of UTF-8 as the contract says, whatever the characters, and not one more [T12]."""
    width = len(character.encode())
    text = "aaaaaaaa" + character * ((most - 8) // width)
    assert asked(**fields(text))
    too_long = text + "a"
    assert refusal(**fields(too_long)) == f"{path}: {most + 1} bytes, at most {most}"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "$.prompt: expected str of length >= 1"),
        ({"grammar": ""}, "$.grammar: expected str of length >= 1"),
        ({"session_id": ""}, "$.session_id: expected str of length >= 1"),
        ({"stop": [""]}, "$.stop[0]: expected str of length >= 1"),
        ({"stop": ["a"] * 9}, "$.stop: expected array of length <= 8"),
        ({"stop": "a"}, "$.stop: expected array, got str"),
        ({"stop": ["a", 1]}, "$.stop[1]: expected str, got int"),
        ({"metadata": {str(n): "" for n in range(17)}}, "$.metadata: expected object of length <= 16"),
        ({"metadata": {"a": 1}}, "$.metadata[...]: expected str, got int"),
        ({"metadata": {"a": None}}, "$.metadata[...]: expected str, got null"),
        ({"metadata": []}, "$.metadata: expected object, got array"),
        ({"json_schema": True}, "$.json_schema: expected object, got bool"),
        ({"json_schema": "{}"}, "$.json_schema: expected object, got str"),
        ({"pool_id": 1}, "$.pool_id: expected str, got int"),
        ({"priority": "low"}, "$.priority: expected one of interactive, batch"),
        ({"determinism": "maybe"}, "$.determinism: expected one of strict, best_effort"),
    ],
)
def test_a_wrong_value_is_named_by_its_path(fields: dict[str, Any], message: str) -> None:
    """Emptiness, counts, types and names outside an enumeration, each with the place [T12]."""
    assert refusal(**fields) == message


def test_full_lists_and_tables_are_accepted() -> None:
    """8 stop strings and 16 pairs of metadata, empty values included."""
    stop, pairs = [str(n) for n in range(8)], {str(n): "" for n in range(16)}
    request = asked(stop=stop, metadata=pairs, pool_id="other", session_id="s")
    assert request.sampling.stop == tuple(stop)
    assert (request.metadata, request.pool_id, request.session_id) == (pairs, "other", "s")
    assert asked(stop=[], metadata={}).metadata == {}


@pytest.mark.parametrize("field", FIELDS)
def test_null_is_not_the_same_as_absent(field: str) -> None:
    """The engine takes null for absent; here it is a fault in every field."""
    assert refusal(**{field: None}).startswith(f"$.{field}: ")


# -- unknown fields and nested paths ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperatur": 1}, "$.temperatur: unknown field, did you mean temperature?"),
        ({"Seed": 1}, "$.Seed: unknown field, did you mean seed?"),
        ({"max_token": 1}, "$.max_token: unknown field, did you mean max_tokens?"),
        (
            {"stream": True},
            "$.stream: unknown field, leave it out: every task has a stream, at the stream_url of its answer",
        ),
        ({"n_predict": 1}, "$.n_predict: unknown field, did you mean max_tokens?"),
        ({"id_slot": 0}, "$.id_slot: unknown field"),
        ({"": 1}, "$.: unknown field"),
        ({"a`b": 1}, "$.a`b: unknown field"),
    ],
)
def test_an_unknown_field_is_refused(fields: dict[str, Any], message: str) -> None:
    """With the field that was probably meant; the engine's own parameters are unknown too."""
    assert refusal(**fields) == message


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "$.messages: expected array of length >= 1"),
        ({"role": "user"}, "$.messages: expected array, got object"),
        (["hello"], "$.messages[0]: expected object, got str"),
        ([{}], "$.messages[0].role: this field is required"),
        ([{"role": "user"}], "$.messages[0].content: this field is required"),
        ([{"role": "user", "content": None}], "$.messages[0].content: expected str, got null"),
        ([{"role": "user", "content": ["a"]}], "$.messages[0].content: expected str, got array"),
        (
            [{"role": "user", "content": "a"}, {"role": "user", "contnet": "a"}],
            "$.messages[1].contnet: unknown field, did you mean content?",
        ),
    ],
)
def test_a_fault_in_a_message_is_named_by_its_path(messages: Any, message: str) -> None:
    """Down to the field, with suggestions from its own fields."""
    assert refused({"messages": messages}) == message


# -- what belongs together -------------------------------------------------------------------------


def test_exactly_one_of_prompt_and_messages() -> None:
    """Neither and both are refused [MVP-030]."""
    needed = "$: exactly one of prompt and messages is needed"
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}]
    assert refused({}) == needed
    assert refusal(messages=turns) == needed
    assert (request({"prompt": "x"}).prompt, request({"prompt": "x"}).messages) == ("x", ())
    said = request({"messages": turns})
    assert (said.prompt, said.messages) == (None, (Message("system", ""), Message("user", "hi")))


def test_at_most_one_of_grammar_and_json_schema() -> None:
    """The engine would let one win."""
    assert refusal(grammar="root ::= x", json_schema={}) == "$: at most one of grammar and json_schema"
    assert asked(grammar="root ::= x").sampling.grammar == "root ::= x"
    assert asked(json_schema={}).sampling.json_schema == b"{}"


@pytest.mark.parametrize(
    ("fields", "determinism"),
    [
        ({}, "best_effort"),
        ({"seed": 0}, "strict"),
        ({"seed": 7, "determinism": "strict"}, "strict"),
        ({"seed": 7, "determinism": "best_effort"}, "best_effort"),
        ({"determinism": "best_effort"}, "best_effort"),
    ],
)
def test_a_seed_makes_a_task_strict(fields: dict[str, Any], determinism: str) -> None:
    """Unless it says otherwise; seed 0 is a seed [MVP-042]."""
    assert asked(**fields).determinism == determinism


def test_strict_needs_a_seed() -> None:
    """Strict without a seed promises what can't be kept [MVP-042]."""
    assert refusal(determinism="strict") == "$.determinism: strict needs a seed"


def test_a_task_names_its_lane() -> None:
    """Interactive if it does not."""
    assert asked(priority="batch").priority == "batch"
    assert asked(priority="interactive").priority == asked().priority == "interactive"


def test_sampling_values_not_given_are_ours() -> None:
    """Sampler profile 1 decides, not the engine's flags."""
    assert asked() == TaskRequest(
        prompt="hello",
        max_tokens=None,
        determinism="best_effort",
        sampling=Sampling(
            seed=None,
            temperature=0.8,
            top_k=40,
            top_p=0.95,
            min_p=0.05,
            typical_p=1.0,
            repeat_penalty=1.0,
            repeat_last_n=64,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            stop=(),
            grammar=None,
            json_schema=None,
        ),
    )


# -- bodies that are no JSON -----------------------------------------------------------------------

GOOD = b'{"prompt":"x"}'
MALFORMED = {
    "empty": b"",
    "blank": b" \n",
    "null": b"null",
    "list": b"[]",
    "list of one": b"[" + GOOD + b"]",
    "number": b"3",
    "text": b'"prompt"',
    "cut off": GOOD[:-1],
    "trailing bytes": GOOD + b"x",
    "two bodies": GOOD + GOOD,
    "trailing comma": b'{"prompt":"x",}',
    "comment": b'{"prompt":"x"/**/}',
    "single quotes": b"{'prompt':'x'}",
    "UTF-16": GOOD.decode().encode("utf-16"),
    "UTF-16 LE": GOOD.decode().encode("utf-16-le"),
    "UTF-32": GOOD.decode().encode("utf-32"),
    "BOM": b"\xef\xbb\xbf" + GOOD,
    "deep list": b"[" * 100_000,
    "deep object": b'{"prompt":' * 100_000,
    "deep schema": b'{"prompt":"x","json_schema":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    "deep list in a schema": b'{"prompt":"x","json_schema":{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
    "5,000 digits": b'{"prompt":"x","seed":' + b"9" * 5000 + b"}",
    "5,000 digits in a float": b'{"prompt":"x","temperature":' + b"9" * 5000 + b"}",
    "5,000 digits in a schema": b'{"prompt":"x","json_schema":{"a":' + b"9" * 5000 + b"}}",
    "1e400": b'{"prompt":"x","temperature":1e400}',
    "1e400 in a schema": b'{"prompt":"x","json_schema":{"a":1e400}}',
    "NaN": b'{"prompt":"x","temperature":NaN}',
    "NaN in a schema": b'{"prompt":"x","json_schema":{"a":NaN}}',
    "Infinity": b'{"prompt":"x","temperature":-Infinity}',
    "raw NUL": b"\0",
    "raw NUL in a text": b'{"prompt":"a\0b"}',
    "raw newline in a text": b'{"prompt":"a\nb"}',
    "NUL after the end": GOOD + b"\0",
    "high surrogate": rb'{"prompt":"\ud800"}',
    "low surrogate": rb'{"prompt":"\udc00"}',
    "surrogates the wrong way round": rb'{"prompt":"\ude00\ud83d"}',
    "surrogate in UTF-8": b'{"prompt":"\xed\xa0\x80"}',
    "surrogate in a schema": rb'{"prompt":"x","json_schema":{"a":"\ud800"}}',
    "invalid UTF-8": b'{"prompt":"\xff"}',
    "invalid UTF-8 in a name": b'{"\xff":"x"}',
    "invalid UTF-8 in metadata": b'{"prompt":"x","metadata":{"\xff":"a"}}',
    "overlong UTF-8": b'{"prompt":"\xc0\xaf"}',
    "cut UTF-8": b'{"prompt":"\xe2\x82"}',
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_body_is_a_400(body: bytes) -> None:
    """Whatever is in it, it is INVALID_PARAMS with a path, and never a crash [C9]."""
    assert ": " in refused(body)


def test_an_empty_body_is_told_what_is_wanted() -> None:
    """The commonest mistake of all."""
    assert refused(b"") == "$: the body is empty, expected a JSON object"


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        (b'{"prompt":"x","prompt":"y"}', "y"),
        (rb'{"prompt":"a\u0000b"}', "a\0b"),
        (rb'{"prompt":"\ud83d\ude00"}', "\U0001f600"),
        ('{"prompt":"\u2028é\U0001f600"}'.encode(), "\u2028é\U0001f600"),
        (rb'{"\u0070rompt":"x"}', "x"),
        (b' \t\r\n{ "prompt" : "x" } \n', "x"),
    ],
)
def test_odd_but_legal_json_is_read(body: bytes, prompt: str) -> None:
    """Of duplicate keys the last counts, an escaped NUL is legal, and so is space around it all [C9]."""
    assert request(body).prompt == prompt


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "x", "n" * 1_000_000: 1},
        {"prompt": "x", "\U0001f600" * 1_000_000: 1},
        {"prompt": "x", "` - at `" * 100_000: 1},
        {"messages": [{"n" * 1_000_000: 1}]},
        {"prompt": "x", "priority": "p" * 1_000_000},
        {"prompt": "x", "priority": "\U0001f600" * 1_000_000},
        {"prompt": "x", "metadata": {"k" * 1_000_000: "v"}},
        {"prompt": "x", "metadata": {"k" * 1_000_000: 1}},
        {"prompt": "x", "metadata": {"\0" * 64: "v" * 1_000_000}},
        {"prompt": "x", "session_id": "s" * 1_000_000},
    ],
)
def test_a_megabyte_in_a_fault_makes_no_long_message(body: dict[str, Any]) -> None:
    """The answer does not send the attacker's bytes back, nor does the log get them [T12]."""
    assert refused(json.dumps(body, ensure_ascii=False).encode())


# -- json_schema -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schema",
    [
        b'{"type":"object","properties":{"z":{"type":"string"},"a":{"type":"integer"}},"required":["z","a"]}',
        '{"pattern":"^\\\\d+é\U0001f600$","const":"</script>"}'.encode(),
        b'{"minimum":-9223372036854775808,"maximum":18446744073709551615}',
        b'{"enum":[1,1.0,1.5,-0.0,1e100,null,true,false,"",[],{}]}',
        b'{"":{" ":{}}}',
    ],
)
def test_a_schema_is_forwarded_as_it_was_said(schema: bytes) -> None:
    """Order, types and texts stay: for the engine the order of properties is the order of the output."""
    forwarded = request(b'{"prompt":"x","json_schema":' + schema + b"}").sampling.json_schema
    assert forwarded is not None
    assert json.loads(forwarded, object_pairs_hook=repr) == json.loads(schema, object_pairs_hook=repr)


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
SCHEMA_VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda values: st.lists(values) | st.dictionaries(TEXT, values),
    max_leaves=10,
)


@given(st.dictionaries(TEXT, SCHEMA_VALUES))
@settings(deadline=None, max_examples=50)
def test_any_schema_is_forwarded_unchanged(schema: dict[str, Any]) -> None:
    """What the engine will read is what the client wrote, for all JSON."""
    forwarded = asked(json_schema=schema).sampling.json_schema
    assert forwarded is not None
    assert repr(json.loads(forwarded)) == repr(schema)


# -- anything at all -------------------------------------------------------------------------------

FIELD_NAMES = st.sampled_from([*FIELDS, "role", "content"])
ANY_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.sampled_from(["strict", "best_effort", "interactive", "batch", 2**32 - 1, 2**64, 0.5, 1, "x" * 129]),
    lambda values: (
        st.lists(values, max_size=9) | st.dictionaries(st.text(max_size=70) | FIELD_NAMES, values, max_size=5)
    ),
    max_leaves=8,
)


def only_good_values(body: bytes) -> None:
    """`body` gives a request within every range, or InvalidParams with a path; nothing else comes out."""
    try:
        said = wire.task_request(body, max_tokens=CEILING)
    except InvalidParams as refusal:
        is_told(refusal.message)
        return
    sampling = said.sampling
    for field, low, high in RANGES:
        value = getattr(said if field == "max_tokens" else sampling, field)
        assert value is None or low <= value <= high
    assert (said.prompt is None) != (said.messages == ())
    assert said.prompt != ""
    assert said.determinism == "best_effort" or sampling.seed is not None
    assert said.priority == "interactive"
    assert len(sampling.stop) <= 8
    assert all(1 <= len(text.encode()) <= 128 for text in sampling.stop)
    assert sampling.grammar is None or sampling.json_schema is None
    assert max(len((sampling.grammar or "").encode()), len(sampling.json_schema or b"")) <= KIB_64
    assert len(said.metadata) <= 16
    assert all(len(k.encode()) <= 64 and len(v.encode()) <= 512 for k, v in said.metadata.items())


@given(st.dictionaries(FIELD_NAMES, ANY_VALUE, max_size=5), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=200)
def test_any_json_gives_a_good_request_or_a_400(
    fields: dict[str, Any], with_prompt: bool, ascii_only: bool
) -> None:
    """A request within every range, or INVALID_PARAMS with a path: for all JSON, surrogates included [C9]."""
    body = {"prompt": "x"} | fields if with_prompt else fields
    only_good_values(json.dumps(body, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))


@given(ANY_VALUE)
@settings(deadline=None)
def test_json_of_any_shape_is_answered(value: Any) -> None:
    """Not only objects come [C9]."""
    only_good_values(json.dumps(value).encode())


@given(st.binary(), st.integers(0, 300), st.binary(max_size=4), st.integers(0, 4))
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_answered(noise: bytes, at: int, put: bytes, cut: int) -> None:
    """Noise, and a good body with a few bytes changed at any place [C9]."""
    only_good_values(noise)
    good = b'{"prompt":"h\\u00e9llo","seed":7,"stop":["a"],"metadata":{"k":"v"},"json_schema":{"a":[1.5e3]}}'
    only_good_values(good[:at] + put + good[at + cut :])


# -- what goes out ---------------------------------------------------------------------------------


class Clock:
    """A clock that goes on only when it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def make_task(clock: Clock, *, ticket: str | None = None, **fields: Any) -> Task:
    """A task admitted behind two others, 250 ms before it is expected to start."""
    task = Task(
        "4f" * 16,
        TaskRequest(prompt="hello", **fields),
        prompt="hello",
        max_tokens=8,
        pool_id="default",
        now=clock,
        on_transition=lambda task, previous: None,
        ticket=ticket,
    )
    task.created_at = datetime(2026, 1, 2, 3, 4, 5, 678_900, UTC).timestamp()
    task.admit(2, 250)
    return task


class Lease:
    """What a running task holds."""

    replica_id = "default-0"

    def interrupt(self) -> None:
        """Nothing runs here."""


def shown(view: Any) -> Any:
    """What a client reads."""
    return json.loads(msgspec.json.encode(view))


def test_the_202_says_where_to_go() -> None:
    """Position, prediction and two paths; the correlation id in the mvp profile alone [MVP-030]."""
    task = make_task(Clock())
    path = f"/v1/tasks/{task.id}"
    expected = {
        "task_id": task.id,
        "queue_position": 2,
        "predicted_start_ms": 250,
        "stream_url": f"{path}/stream",
        "cancel_url": f"{path}/cancel",
    }
    assert shown(wire.created(task, None)) == expected
    assert shown(wire.created(task, "c-1")) == expected | {"correlation_id": "c-1"}


def test_the_202_says_nothing_of_what_is_not_known() -> None:
    """No prediction before anything was measured; position 0 is known."""
    task = make_task(Clock())
    task.queue_position, task.predicted_start_ms = 0, None
    answer = shown(wire.created(task, None))
    assert answer["queue_position"] == 0
    assert "predicted_start_ms" not in answer


def test_a_stream_url_carries_the_ticket() -> None:
    """For browsers that can't send a header; not in lists, and not in the URL for cancelling."""
    task = make_task(Clock(), ticket="t1ck3t")
    assert wire.created(task, None).stream_url == f"/v1/tasks/{task.id}/stream?ticket=t1ck3t"
    assert b"t1ck3t" not in msgspec.json.encode(wire.snapshot(task, 0, with_stream_url=False))
    assert "t1ck3t" not in wire.created(task, None).cancel_url


def test_a_snapshot_of_a_waiting_task() -> None:
    """What is not known is null where it will be a number later, and absent where it may never be."""
    task = make_task(Clock(), session_id="s", metadata={"k": "v"})
    assert shown(wire.snapshot(task, 1, with_stream_url=True)) == {
        "task_id": task.id,
        "state": "queued",
        "priority": "interactive",
        "determinism": "best_effort",
        "pool_id": "default",
        "session_id": "s",
        "metadata": {"k": "v"},
        "queue_position": 1,
        "predicted_start_ms": 250,
        "tokens_out": 0,
        "created_at": "2026-01-02T03:04:05.678Z",
        "timings": {"queue_ms": None, "first_token_ms": None, "decode_time_ms": None},
        "stream_url": f"/v1/tasks/{task.id}/stream",
    }


def test_a_snapshot_of_a_completed_task() -> None:
    """Counts are the engine's, times are ours; position is null, metadata is still there."""
    clock = Clock()
    task = make_task(clock, metadata={"k": "v"}, sampling=Sampling(seed=1), determinism="strict")
    clock.now += 0.5
    task.start(Lease())
    clock.now += 0.125
    task.token("a")
    clock.now += 0.25
    task.token("b")
    task.complete("length", tokens_out=3, tokens_in=1)
    answer = shown(wire.snapshot(task, None, with_stream_url=False))
    assert answer == {
        "task_id": task.id,
        "state": "completed",
        "priority": "interactive",
        "determinism": "strict",
        "pool_id": "default",
        "replica_id": "default-0",
        "metadata": {"k": "v"},
        "queue_position": None,
        "predicted_start_ms": 250,
        "tokens_in": 1,
        "tokens_out": 3,
        "created_at": "2026-01-02T03:04:05.678Z",
        "timings": {"queue_ms": 500, "first_token_ms": 125, "decode_time_ms": 250},
        "finish_reason": "length",
    }


def test_a_snapshot_of_a_failed_task() -> None:
    """Its error is the one of the stream."""
    task = make_task(Clock())
    task.fail(Error("QUEUE_TIMEOUT", True, 2000, "too long"), cause="hello")
    answer = shown(wire.snapshot(task, None, with_stream_url=False))
    assert answer["state"] == "failed"
    assert answer["error"] == {
        "code": "QUEUE_TIMEOUT",
        "retriable": True,
        "retry_after_ms": 2000,
        "message": "too long",
    }
    assert not {"finish_reason", "metadata", "session_id", "tokens_in", "replica_id"} & set(answer)


def test_a_snapshot_never_shows_the_prompt() -> None:
    """It is what others may read over the shoulder."""
    task = make_task(Clock(), messages=(Message("user", "canary-prompt"),))
    task.prompt = "canary-prompt"
    assert b"canary-prompt" not in msgspec.json.encode(wire.snapshot(task, 0, with_stream_url=True))


MVP, HOME = False, True


@pytest.mark.parametrize(
    ("error", "home", "more"),
    [
        (
            QueueFull("full", engine="llamacpp", retry_after_ms=750),
            MVP,
            {"policy_label": "reject", "retriable": True, "retry_after_ms": 750},
        ),
        (
            QueueFull("full", engine="llamacpp", retry_after_ms=750),
            HOME,
            {"retriable": True, "retry_after_ms": 750},
        ),
        (
            PoolUnready("full", engine="llamacpp", retry_after_ms=1, hint="wait"),
            MVP,
            {"retriable": True, "retry_after_ms": 1, "hint": "wait"},
        ),
        (
            PoolUnready("full", engine="llamacpp", retry_after_ms=1, hint="wait"),
            HOME,
            {"retriable": True, "retry_after_ms": 1},
        ),
        (TooManyStreams("full", engine="llamacpp"), HOME, {"retriable": True}),
        (InvalidParams("full", engine="llamacpp"), MVP, {"retriable": False}),
        (InvalidParams("full", engine="llamacpp"), HOME, {}),
        (ContextOverflow("full", engine="llamacpp"), MVP, {"retriable": False}),
        (DeterminismUnavailable("full", engine="llamacpp", hint="h"), MVP, {"retriable": False, "hint": "h"}),
        (DeterminismUnavailable("full", engine="llamacpp", hint="h"), HOME, {}),
        (BodyTooLarge("full", engine="llamacpp"), HOME, {}),
        (TaskNotFound("full", engine="llamacpp"), MVP, {}),
        (MissingToken("full", engine="llamacpp", hint="h"), MVP, {"hint": "h"}),
        (MissingToken("full", engine="llamacpp", hint="h"), HOME, {}),
        (ForbiddenHost("full", engine="llamacpp", hint="h"), HOME, {}),
        (InternalError("full", engine="llamacpp"), MVP, {"retriable": False}),
    ],
)
def test_the_envelope_of_a_refusal(error: LlorchError, home: bool, more: dict[str, Any]) -> None:
    """Code, message and engine always; the rest where it helps, and little of it in the home profile."""
    envelope = {"code": error.code, "message": "full", "engine": "llamacpp"}
    assert shown(wire.refusal(error, home=home)) == envelope | more


def test_the_engine_of_a_refusal_is_null_where_no_pool_is_concerned() -> None:
    """The key is always there."""
    assert shown(wire.refusal(MissingToken("who?"), home=True)) == {
        "code": "MISSING_TOKEN",
        "message": "who?",
        "engine": None,
    }


@pytest.mark.parametrize("state", State)
def test_a_state_can_be_asked_for(state: State) -> None:
    """By the name that snapshots have; without a filter there is none."""
    assert wire.state_filter(state.value) is state
    assert wire.state_filter(None) is None


@pytest.mark.parametrize("text", ["", "QUEUED", "done", "queued ", "x" * 100_000])
def test_an_unknown_state_is_refused(text: str) -> None:
    """With those there are."""
    with pytest.raises(
        InvalidParams, match="expected one of queued, running, completed, failed, cancelled"
    ) as e:
        wire.state_filter(text)
    assert len(e.value.message) < 200


@pytest.mark.parametrize(("text", "limit"), [(None, 100), ("1", 1), ("0007", 7), ("1000", 1000)])
def test_a_limit_is_1_to_1000(text: str | None, limit: int) -> None:
    """100 if nobody asks."""
    assert wire.limit_filter(text) == limit


@pytest.mark.parametrize("text", ["", "0", "1001", "-1", "+1", "1.0", " 1", "1\n", "1e3", "٣", "9" * 100_000])
def test_any_other_limit_is_refused(text: str) -> None:
    """Signs, spaces and digits of other scripts included."""
    with pytest.raises(InvalidParams, match=r"^\?limit: expected 1 to 1000, got ") as error:
        wire.limit_filter(text)
    assert len(error.value.message) < 200


# -- what takes an engine down (T12) -----------------------------------------------------------------

BOMBS = {
    "nested groups": {"grammar": "root ::= " + "(" * 1001 + '"a"' + ")" * 1001},
    "a vast repeat": {"grammar": 'root ::= "a"{1,100000}'},
    "a vast array": {"json_schema": {"type": "array", "minItems": 100_000_000}},
    "a vast array as a float": {"json_schema": {"type": "array", "maxItems": 1e8}},
    "a vast string": {"json_schema": {"type": "string", "maxLength": 10_001}},
    "a vast repeat in a pattern": {"json_schema": {"type": "string", "pattern": "^a{99999}$"}},
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_what_takes_an_engine_down_is_refused(bomb: dict[str, object]) -> None:
    """T12: nested groups crash llama.cpp, vast repeats eat its memory; neither reaches it."""
    field = next(iter(bomb))
    with pytest.raises(InvalidParams, match=rf"^\$\.{field}: .*at most 1000|a repeat of over 10000"):
        wire.task_request(msgspec.json.encode({"prompt": "x", **bomb}), max_tokens=100)


@pytest.mark.parametrize(
    "fine",
    [
        {"grammar": 'root ::= ("a" | "b"){2,10000} [a-z]* "{}"'},
        {"json_schema": {"type": "array", "minItems": 2, "maxItems": 10_000, "items": {"pattern": "^a{3}$"}}},
    ],
)
def test_what_an_engine_can_do_passes(fine: dict[str, object]) -> None:
    """A grammar or schema of an ordinary size is forwarded."""
    assert wire.task_request(msgspec.json.encode({"prompt": "x", **fine}), max_tokens=100)
