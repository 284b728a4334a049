"""One engine version and one model per pool: a strict stream must not depend on which replica ran it.

The one rule: what is not known can't disagree; a model's digest outweighs its name.
"""

import msgspec

from llorch.engine import Props


class Made(msgspec.Struct, frozen=True):
    """What a replica's answers are made with, as far as it is known."""

    engine_version: str | None
    model: str | None
    model_digest: str | None

    @classmethod
    def of(cls, props: Props | None, model_digest: str | None) -> "Made":
        """By what the engine says of itself and the digest of its model."""
        if props is None:
            return cls(None, None, None)
        return cls(props.engine_version, props.model, model_digest)

    def or_else(self, before: "Made") -> "Made":
        """This, and what was known `before` where nothing is known now."""
        return Made(
            self.engine_version or before.engine_version,
            self.model or before.model,
            self.model_digest or before.model_digest,
        )


def disagreement(made: Made, with_pool: Made) -> str | None:
    """Why one that is `made` so can't work beside those of the pool; None if it can."""
    if made.engine_version and with_pool.engine_version and made.engine_version != with_pool.engine_version:
        return f"it runs engine {made.engine_version}, the pool {with_pool.engine_version}"
    if made.model_digest and with_pool.model_digest:
        if made.model_digest == with_pool.model_digest:
            return None
        return f"it has another model ({made.model_digest[:19]}…), the pool {with_pool.model_digest[:19]}…"
    if made.model and with_pool.model and made.model != with_pool.model:
        return f"it has the model {made.model}, the pool {with_pool.model}"
    return None
