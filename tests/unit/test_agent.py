"""The declaration: what it yields, and what it refuses at import."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, computed_field

from sutazai.agent import Action, Agent, Context, Delegation, NoParams, normalise
from sutazai.errors import DeclarationError, InvalidInput, InvalidResult, UnknownAction
from sutazai.testing import context


class Params(BaseModel):
    model_config = ConfigDict(extra="ignore")  # the platform refuses unknown fields all the same

    count: int = Field(ge=0)
    words: list[str] = []


class Total(BaseModel):
    total: int

    @computed_field
    def double(self) -> int:
        return self.total * 2


def make() -> Agent:
    return Agent("adder", port=8100, doc="Adds.")


def add_action(agent: Agent, **limits: Any) -> Action[Params, Total]:
    @agent.action(**limits)
    def add(params: Params, context: Context) -> Total:
        """Add up."""
        context.progress(1.0, "done")
        return Total(total=params.count + len(params.words))

    return add


def test_an_action_is_a_plain_call() -> None:
    add = add_action(make())
    seen = context()
    assert add(Params(count=2, words=["a"]), seen) == Total(total=3)
    assert seen.progressed == [(1.0, "done")]
    assert add.full_name == "adder.add"


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({}, "count"),
        ({"count": "3"}, "count"),
        ({"count": 1.5}, "count"),
        ({"count": -1}, "count"),
        ({"count": 1, "unknown": 2}, "unknown"),
        ({"count": 1, "words": [1]}, "words.0"),
    ],
)
def test_parameters_are_refused_with_the_field_named(params: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        add_action(make()).parse(params)
    assert [fault["field"] for fault in refused.value.details] == [field]


def test_results_are_validated_and_dumped() -> None:
    add = add_action(make())
    assert add.dump(Total(total=3)) == {"total": 3, "double": 6}
    with pytest.raises(InvalidResult):
        add.dump(Total.model_construct(total="three"))
    with pytest.raises(InvalidResult):
        add.dump(NoParams())


class Float(BaseModel):
    value: float
    text: str = ""


@pytest.mark.parametrize(
    "result",
    [Float(value=float("nan")), Float(value=1, text="a\x00"), Float(value=1, text="x" * (1 << 20))],
    ids=["nan", "nul", "too large"],
)
def test_results_that_cannot_be_stored(result: Float) -> None:
    agent = make()

    @agent.action()
    def give(params: NoParams, context: Context) -> Float:
        """Give."""
        return result

    with pytest.raises(InvalidResult):
        give.dump(result)


def test_every_agent_describes_itself() -> None:
    agent = make()
    add_action(agent, time_limit_s=5, max_attempts=3)
    described = agent.get("describe")(NoParams(), context())
    assert [action.name for action in described.actions] == ["describe", "add"]
    assert (described.port, described.queue, described.slots_max) == (8100, "adder", 4)


def test_an_unknown_action_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownAction, match="describe"):
        make().get("nope")


def test_the_schema_refuses_unknown_fields() -> None:
    schema = add_action(make()).params_schema
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["count"]


def test_underscores_in_names_mean_hyphens() -> None:
    assert normalise("hardware_resource_optimizer") == "hardware-resource-optimizer"


class Reserved(BaseModel):
    status: str


class ReservedParams(BaseModel):
    request_id: str


def no_docstring(params: Params, context: Context) -> Total:
    return Total(total=1)


def no_models(params: dict[str, int], context: Context) -> Total:
    """Lack a model."""
    return Total(total=1)


def no_result(params: Params, context: Context) -> None:
    """Lack a result."""


def reserved_result(params: Params, context: Context) -> Reserved:
    """Use a reserved name."""
    return Reserved(status="")


def reserved_params(params: ReservedParams, context: Context) -> Total:
    """Use a reserved name."""
    return Total(total=1)


def one_argument(params: Params) -> Total:
    """Take too little."""
    return Total(total=1)


async def coroutine(params: Params, context: Context) -> Total:
    """Be asynchronous."""
    return Total(total=1)


def describe(params: Params, context: Context) -> Total:
    """Be there already."""
    return Total(total=1)


def Capital(params: Params, context: Context) -> Total:  # noqa: N802
    """Have a bad name."""
    return Total(total=1)


@pytest.mark.parametrize(
    "function",
    [
        no_docstring,
        no_models,
        no_result,
        reserved_result,
        reserved_params,
        one_argument,
        coroutine,
        describe,
        Capital,
    ],
)
def test_a_wrong_action_is_refused_at_import(function: Callable[..., Any]) -> None:
    with pytest.raises(DeclarationError, match="adder"):
        make().action()(function)


@pytest.mark.parametrize(
    "limits",
    [{"time_limit_s": 0}, {"max_attempts": 0}, {"every": timedelta(milliseconds=1)}],
)
def test_wrong_limits_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(DeclarationError):
        add_action(make(), **limits)


def test_a_schedule_needs_an_action_without_required_parameters() -> None:
    with pytest.raises(DeclarationError, match="without parameters"):
        add_action(make(), every=timedelta(seconds=30))


@pytest.mark.parametrize(
    "values",
    [
        {"name": "Adder"},
        {"name": "add_er"},
        {"doc": " "},
        {"port": 0},
        {"slots": (2, 1, 4)},
        {"slots": (0, 1, 1)},
        {"pool": "gevent"},
        {"retention": timedelta(hours=1)},
    ],
)
def test_a_wrong_agent_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(DeclarationError):
        Agent(**({"name": "adder", "port": 8100, "doc": "Adds."} | values))


def test_an_action_may_delegate() -> None:
    agent = make()

    @agent.action()
    def ask(params: NoParams, context: Context) -> Total | Delegation:
        """Ask another agent."""
        return context.delegate("other.add", {"count": 1})

    seen = context()
    assert isinstance(ask(NoParams(), seen), Delegation)
    assert seen.children == [("other.add", {"count": 1})]
    assert ask.result_model is Total
