"""The replicas of one pool: which of them count, what they are together, who joins and who leaves.

The one rule: the ones that work have one engine version and one model; a replica that differs is kept out.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence

from llorch.agreement import Made, disagreement
from llorch.engine import Props
from llorch.estimate import Busy
from llorch.health import ReplicaHealth, SlotCounts
from llorch.placement import Candidate
from llorch.replica import Health, Replica
from llorch.selftest import Determinism

FreeVram = Callable[[tuple[int, ...]], int | None]


class ReplicaSet:
    """Replicas that are looked after together.

    `on_change` is called whenever the head of a queue may go, `on_readiness` for each replica whose
    readiness, or the reason for it, is another. `free_vram` says how many bytes some GPUs have free, None if
    that is not known.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        on_change: Callable[[], None],
        on_readiness: Callable[[Replica], None],
        free_vram: FreeVram,
    ) -> None:
        self._replicas: list[Replica] = []
        self._retiring: dict[Replica, None] = {}  # in the order in which they were let go
        self._anchor: Replica | None = None
        self._agreed: list[Replica] = []
        self._made = Made(None, None, None)  # what the anchor told, or the ones before it
        self._on_change = on_change
        self._on_readiness = on_readiness
        self._said: dict[Replica, tuple[bool, str, str | None]] = {}
        self._free_vram = free_vram
        self._looks: asyncio.TaskGroup | None = None
        self.take(replicas)

    def __iter__(self) -> Iterator[Replica]:
        """In the order of the configuration."""
        return iter(self._replicas)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._replicas)

    def __getitem__(self, number: int) -> Replica:
        """The replica at that place of the configuration."""
        return self._replicas[number]

    # -- what they are together ---------------------------------------------------------------

    @property
    def props(self) -> Props | None:
        """What their engine says of itself, None until one has."""
        told = [replica.props for replica in self._agreed if replica.props is not None]
        return told[0] if told else None

    @property
    def engine_version(self) -> str | None:
        """The version that every replica at work has."""
        return self.props.engine_version if self.props else None

    @property
    def model_digest(self) -> str | None:
        """The digest of the model that every replica at work has."""
        told = (replica.model_digest for replica in self._agreed)
        return next((digest for digest in told if digest is not None), None)

    @property
    def ctx(self) -> int:
        """Tokens of context that a slot of any of them holds; 0 until known."""
        told = [replica.props.ctx for replica in self._agreed if replica.props is not None]
        return min(told, default=0)

    @property
    def live(self) -> bool:
        """Whether the HTTP of any of them answers."""
        return any(replica.live for replica in self)

    @property
    def ready(self) -> bool:
        """Whether any of them can take tasks."""
        return any(replica.ready for replica in self)

    @property
    def starting(self) -> bool:
        """Whether none is ready, and none has failed: they are loading, or nobody has looked yet."""
        return not self.ready and {replica.health for replica in self} <= {Health.UNKNOWN, Health.LOADING}

    @property
    def determinism(self) -> Determinism:
        """The best that a ready one, or if none is ready any of them, can promise."""
        found = {replica.determinism for replica in self if replica.ready} or {
            replica.determinism for replica in self
        }
        best: tuple[Determinism, ...] = ("verified", "unknown", "failed")
        return next((verdict for verdict in best if verdict in found), "unknown")

    @property
    def fault(self) -> str | None:
        """What is wrong with the first that has a fault."""
        if len(self) == 1:
            return self[0].fault
        faults = (f"{replica.replica_id}: {replica.fault}" for replica in self if replica.fault)
        return next(faults, None)

    @property
    def slots(self) -> SlotCounts:
        """Slots in force, of the ready replicas if there is one; those at work, those that drain."""
        agreed = self._agreed
        in_force = [replica for replica in agreed if replica.ready] or agreed
        return SlotCounts(
            total=sum(replica.slots for replica in in_force),
            busy=sum(replica.busy for replica in self),
            draining=sum(replica.draining for replica in self),
        )

    @property
    def free_slots(self) -> int:
        """Slots that best-effort tasks could take now."""
        return sum(replica.free_slots for replica in self)

    def health(self) -> list[ReplicaHealth]:
        """How each of them is."""
        return [
            ReplicaHealth(
                replica_id=replica.replica_id,
                ready=replica.ready,
                slots=replica.slots,
                busy=replica.busy,
                draining=replica.draining,
                determinism=replica.determinism,
                devices=replica.devices,
                last_error=replica.fault,
            )
            for replica in self
        ]

    def at_work(self) -> list[Busy]:
        """For how long each of the ready ones has been busy, of all if none is ready."""
        now = asyncio.get_running_loop().time()
        ready = [replica for replica in self if replica.ready]
        return [
            Busy([now - lease.since for lease in replica.leases], replica.slots)
            for replica in ready or self._replicas
        ]

    def candidates(self) -> list[Candidate]:
        """What placement has to know of each."""
        alone = len(self) == 1
        return [
            Candidate(
                replica_id=replica.replica_id,
                ready=replica.ready,
                open=replica.open,
                slots=replica.slots,
                active=len(replica.leases),
                determinism=replica.determinism,
                devices=replica.devices,
                free_vram_bytes=None if alone else self._free_vram(replica.devices),
            )
            for replica in self
        ]

    def named(self, replica_id: str | None) -> Replica | None:
        """The replica of that name."""
        return next((replica for replica in self if replica.replica_id == replica_id), None)

    def least_busy(self) -> Replica:
        """The ready one with the fewest tasks, for questions that any of them can answer."""
        ready = [replica for replica in self if replica.ready]
        return min(ready or self._replicas, key=lambda replica: len(replica.leases))

    def _sort_out(self) -> None:
        """Note which are not kept out, first the one that the others are held against."""
        agreed = [replica for replica in self if replica.excluded is None]
        self._agreed = sorted(agreed, key=lambda replica: replica is not self._anchor)

    # -- coming and going ---------------------------------------------------------------------

    def take(self, replicas: Sequence[Replica]) -> None:
        """Have these from now on; whoever is no longer among them finishes what it runs and is let go."""
        retired = [replica for replica in self if replica not in replicas]
        added = [replica for replica in replicas if replica not in self._replicas]
        self._replicas = list(replicas)
        self._sort_out()
        for replica in retired:
            self._retiring[replica] = None
            self._said.pop(replica, None)
            replica.engine.keep_spare(False)
            replica.retire()
        for replica in added:
            replica.on_change, replica.on_free = self._changed, self._on_change
            self._look_after(replica)
        self._agree()
        for replica in added:
            if replica.health is not Health.UNKNOWN:  # it was probed before it came
                self._say(replica)

    def _changed(self, replica: Replica) -> None:
        if replica in self._replicas:
            self._agree()
            self._say(replica)
        self._on_change()

    def _say(self, replica: Replica) -> None:
        said = (replica.ready, replica.determinism, replica.fault)
        if said != self._said.get(replica):
            self._said[replica] = said
            self._on_readiness(replica)

    def _agree(self) -> None:
        """Hold all against what the one that was ready first is made with; only when nobody who agrees with
        that can work does the next one count. It is kept out itself if it becomes another than it was."""
        able = [replica for replica in self if replica.able]
        if not able:
            return
        agreed = [replica for replica in able if disagreement(replica.made, self._made) is None]
        if self._anchor not in agreed:
            self._anchor = (agreed or able)[0]
            self._sort_out()
        self._made = self._anchor.made.or_else(self._made) if agreed else self._anchor.made
        made = self._made
        for replica in sorted(able, key=lambda replica: replica.excluded is not None):
            if disagreement(replica.made, made) is None:  # what it alone can tell holds for the others too
                made = made.or_else(replica.made)
        for replica in self:
            reason = disagreement(replica.made, made)
            if reason != replica.excluded:
                replica.exclude(reason)
                self._sort_out()
                self._say(replica)

    # -- life ---------------------------------------------------------------------------------

    async def first_probe(self) -> None:
        """Probe each of them once."""
        await asyncio.gather(*(replica.probe() for replica in self))

    async def run(self) -> None:
        """Look after all of them until cancelled; raises if one of the coroutines has a bug."""
        async with asyncio.TaskGroup() as looks:
            self._looks = looks
            for replica in self:
                self._look_after(replica)
            await asyncio.get_running_loop().create_future()  # the set may be empty of looks, never done

    def _look_after(self, replica: Replica) -> None:
        if self._looks is not None:
            self._looks.create_task(self._keep(replica), name=f"replica-{replica.replica_id}")

    async def _keep(self, replica: Replica) -> None:
        await replica.run()
        await replica.close()
        await replica.engine.close()
        self._retiring.pop(replica, None)

    async def close(self) -> None:
        """Close every engine connection, of those that were on their way out too."""
        for replica in [*self, *self._retiring]:
            await replica.close()
            await replica.engine.close()
