"""One small checker for each rule of the design's section 5, outside of everything: they see facts and know no protocol."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from txrpc._protocol.messages import Outcome, Vote
from verification.simulation.checkers_in_doubt import IN_DOUBT
from verification.simulation.history import Violation

__all__ = ["all_checkers"]

_COMMITTED, _ABORTED, _UNKNOWN = Outcome.COMMITTED, Outcome.ABORTED, Outcome.UNKNOWN


def all_checkers() -> list[Any]:
    """A fresh set."""
    return [checker() for checker in _CHECKERS]


class Agreement:
    """1: no two branches of a transaction end differently."""

    def __init__(self) -> None:
        self._listed: dict[Any, frozenset[Any]] = {}
        self._ends: dict[Any, dict[Any, bool]] = defaultdict(dict)

    def listed(self, _now_ms: int, xid: Any, branches: Iterable[Any]) -> None:
        self._listed[xid] = frozenset(branches)

    def registered(self, _now_ms: int, xid: Any, branch: Any, _branches: Any) -> None:
        # A root that lets its last call decide has not seen its branch yet; it has asked for it all the same.
        if xid in self._listed:
            self._listed[xid] |= {branch}

    def committed(self, _now_ms: int, xid: Any, branch: Any, _calls: Any, _was_prepared: bool) -> None:
        if branch not in self._listed.get(xid, ()):
            raise Violation(1, f"{xid}: branch {branch} has committed, and the root never listed it")
        self._end(xid, branch, True)

    def undone(self, _now_ms: int, xid: Any, branch: Any, _was_prepared: bool) -> None:
        if branch in self._listed.get(xid, ()):
            self._end(xid, branch, False)

    def _end(self, xid: Any, branch: Any, committed: bool) -> None:
        ends = self._ends[xid]
        if ends.setdefault(branch, committed) != committed:
            raise Violation(1, f"{xid}: branch {branch} ended twice, differently")
        if len(set(ends.values())) > 1:
            raise Violation(1, f"{xid}: its branches end differently: {ends}")


class Validity:
    """2: committed only if every branch that the root saw could be."""

    def __init__(self) -> None:
        self._listed: dict[Any, tuple[Any, ...]] = {}
        self._could: set[Any] = set()
        self._deciders: set[Any] = set()

    def listed(self, _now_ms: int, xid: Any, branches: Iterable[Any]) -> None:
        self._listed[xid] = tuple(branches)

    def prepared(self, _now_ms: int, _xid: Any, branch: Any) -> None:
        self._could.add(branch)

    def only_read(self, _now_ms: int, _xid: Any, branch: Any) -> None:
        self._could.add(branch)

    def durable(self, _now_ms: int, xid: Any, _epoch: Any, _branches: Any) -> None:
        if xid not in self._listed:
            raise Violation(2, f"{xid} was decided, and nobody had asked for it")
        self._all_could(xid)

    def registered(self, now_ms: int, xid: Any, branch: Any, branches: Any) -> None:
        self._could.add(branch)
        self._deciders.add(branch)
        self.durable(now_ms, xid, None, branches)

    def committed(self, _now_ms: int, xid: Any, branch: Any, _calls: Any, was_prepared: bool) -> None:
        if was_prepared or branch in self._deciders:
            self._all_could(xid)
        elif len(self._listed.get(xid, ())) > 1:
            raise Violation(2, f"{xid} has other branches, and {branch} committed in one phase")

    def _all_could(self, xid: Any) -> None:
        for branch in self._listed.get(xid, ()):
            if branch not in self._could:
                raise Violation(2, f"{xid} commits, and its branch {branch} was never prepared")


class DurableBeforeTold:
    """3: nobody hears COMMITTED before the decision is durable."""

    def __init__(self) -> None:
        self._needs_record: set[Any] = set()
        self._durable: set[Any] = set()

    def prepared(self, _now_ms: int, xid: Any, _branch: Any) -> None:
        self._needs_record.add(xid)

    def durable(self, _now_ms: int, xid: Any, _epoch: Any, _branches: Any) -> None:
        self._durable.add(xid)

    def registered(self, now_ms: int, xid: Any, _branch: Any, branches: Any) -> None:
        self.durable(now_ms, xid, None, branches)

    def ordered(self, _now_ms: int, xid: Any, branch: Any, commit: bool) -> None:
        if commit and xid not in self._durable:
            raise Violation(3, f"{xid}: {branch} is told to commit before the decision is durable")

    def replied(self, _now_ms: int, xid: Any, outcome: Outcome) -> None:
        self._heard(xid, outcome)

    def told(self, _now_ms: int, xid: Any, outcome: Outcome) -> None:
        self._heard(xid, outcome)

    def _heard(self, xid: Any, outcome: Outcome) -> None:
        if outcome is _COMMITTED and xid in self._needs_record and xid not in self._durable:
            raise Violation(3, f"{xid} is called committed before the decision is durable")


class Promises:
    """4: a branch that voted PREPARED never decides alone."""

    def __init__(self) -> None:
        self._promised: set[Any] = set()
        self._orders: set[tuple[Any, bool]] = set()

    def voted(self, _now_ms: int, _xid: Any, branch: Any, vote: Vote) -> None:
        if vote is Vote.PREPARED:
            self._promised.add(branch)

    def ordered(self, _now_ms: int, _xid: Any, branch: Any, commit: bool) -> None:
        self._orders.add((branch, commit))

    def committed(self, _now_ms: int, xid: Any, branch: Any, _calls: Any, was_prepared: bool) -> None:
        if was_prepared and (branch, True) not in self._orders:
            raise Violation(4, f"{xid}: prepared branch {branch} committed, and nobody had said so")

    def undone(self, _now_ms: int, xid: Any, branch: Any, was_prepared: bool) -> None:
        if was_prepared and branch in self._promised and (branch, False) not in self._orders:
            raise Violation(4, f"{xid}: prepared branch {branch} rolled back, and nobody had said so")


class PresumedAbort:
    """5: having said that a transaction is aborted, the coordinator never commits it."""

    def __init__(self) -> None:
        self._aborted: set[Any] = set()

    def ordered(self, _now_ms: int, xid: Any, _branch: Any, commit: bool) -> None:
        if not commit:
            self._aborted.add(xid)

    def replied(self, _now_ms: int, xid: Any, outcome: Outcome) -> None:
        if outcome is _ABORTED:
            self._aborted.add(xid)

    def durable(self, _now_ms: int, xid: Any, _epoch: Any, _branches: Any) -> None:
        if xid in self._aborted:
            raise Violation(5, f"{xid} is decided after its abort was told")

    def registered(self, now_ms: int, xid: Any, _branch: Any, branches: Any) -> None:
        self.durable(now_ms, xid, None, branches)

    def refused(self, _now_ms: int, xid: Any) -> None:
        self._aborted.add(xid)


class NoEarlyForgetting:
    """6: a record goes only after every prepared branch has committed; and in the end every one goes."""

    def __init__(self) -> None:
        self._open: dict[Any, set[Any]] = {}
        self._committed: set[Any] = set()
        self._records: set[Any] = set()
        self._registered: set[Any] = set()

    def registered(self, _now_ms: int, xid: Any, _branch: Any, branches: Iterable[Any]) -> None:
        self._open[xid] = set(branches) - self._committed
        self._registered.add(xid)

    def durable(self, _now_ms: int, xid: Any, _epoch: Any, branches: Iterable[Any]) -> None:
        self._open[xid] = set(branches) - self._committed
        self._records.add(xid)

    def committed(self, _now_ms: int, xid: Any, branch: Any, _calls: Any, _was_prepared: bool) -> None:
        self._committed.add(branch)
        self._open.get(xid, set()).discard(branch)

    def damaged(self, _now_ms: int, xid: Any, branch: Any) -> None:
        self._committed.add(branch)  # as far as it can
        self._open.get(xid, set()).discard(branch)

    def done(self, _now_ms: int, xid: Any) -> None:
        if self._open.get(xid):
            raise Violation(6, f"{xid} is marked done, and {self._open[xid]} has not committed")
        self._registered.discard(xid)

    def deleted(self, now_ms: int, xid: Any, _early: bool) -> None:
        self.done(now_ms, xid)
        self._records.discard(xid)

    def lost(self, _now_ms: int, xids: Iterable[Any]) -> None:
        self._records.difference_update(xids)
        self._registered.difference_update(xids)

    def rest(self, _now_ms: int) -> None:
        if self._records:
            raise Violation(6, f"records that are never deleted: {self._records}")
        if self._registered:
            raise Violation(6, f"decisions that are never marked as done: {self._registered}")


class Fencing:
    """7: opening epoch e+1 makes every later write of epoch e fail."""

    def __init__(self) -> None:
        self._newest: dict[Any, Any] = {}

    def opened(self, _now_ms: int, node: Any, epoch: Any) -> None:
        self._newest[node] = epoch

    def durable(self, _now_ms: int, xid: Any, epoch: Any, _branches: Any) -> None:
        if epoch not in self._newest.values():
            raise Violation(7, f"{xid} is decided by epoch {epoch}, and {self._newest} have opened the log")


class WholeWork:
    """8 and 9: what commits is what the root saw, all of it (8), and once (9)."""

    def __init__(self) -> None:
        self._saw: dict[Any, Counter[Any]] = defaultdict(Counter)
        self._committed: dict[Any, Counter[Any]] = defaultdict(Counter)
        self._damaged: set[Any] = set()

    def saw(self, _now_ms: int, xid: Any, call: Any) -> None:
        self._saw[xid][call] += 1

    def committed(self, _now_ms: int, xid: Any, branch: Any, calls: Iterable[Any], _was_prepared: bool) -> None:
        self._committed[xid].update(calls)
        extra = self._committed[xid] - self._saw[xid]
        if extra:
            raise Violation(9, f"{xid}: branch {branch} commits work that the root did not see: {dict(extra)}")

    def damaged(self, _now_ms: int, xid: Any, _branch: Any) -> None:
        self._damaged.add(xid)

    def rest(self, _now_ms: int) -> None:
        for xid, committed in self._committed.items():
            if xid in self._damaged:
                continue
            missing = self._saw[xid] - committed
            if missing:
                raise Violation(8, f"{xid} has committed without work that the root saw: {dict(missing)}")


class LateMessages:
    """10: once a transaction has begun to end in a process, no work is added to it there.

    A call that runs meanwhile, in a branch that is not prepared, makes that branch vote against: what it writes is undone.
    """

    def __init__(self) -> None:
        self._process: dict[Any, Any] = {}
        self._ending: set[Any] = set()
        self._promised: set[Any] = set()

    def prepared(self, _now_ms: int, xid: Any, branch: Any) -> None:
        self._ending.add((xid, self._process[branch]))
        self._promised.add(branch)

    def committed(self, _now_ms: int, xid: Any, branch: Any, _calls: Any, _was_prepared: bool) -> None:
        self.prepared(_now_ms, xid, branch)

    def wrote(self, _now_ms: int, xid: Any, branch: Any, call: Any, process: Any) -> None:
        is_new = branch not in self._process
        self._process[branch] = process
        if branch in self._promised or (is_new and (xid, process) in self._ending):
            raise Violation(10, f"{xid}: call {call} writes in branch {branch}, where the transaction has begun to end")


class Deadlines:
    """11: an unprepared branch is gone soon after its deadline, whatever has happened to everybody else."""

    MOST_MS = 30_000
    """The longest timeout, and for nodes that stand still, databases that are down, connections whose end is noticed late.

    Counted from the branch's last write: a call brings the time that is left with it, however long it was on its way.
    """

    def __init__(self) -> None:
        self._open: dict[Any, int] = {}

    def wrote(self, now_ms: int, _xid: Any, branch: Any, _call: Any, _process: Any) -> None:
        self._open[branch] = now_ms

    def prepared(self, _now_ms: int, _xid: Any, branch: Any) -> None:
        self._open.pop(branch, None)

    def committed(self, _now_ms: int, _xid: Any, branch: Any, _calls: Any, _was_prepared: bool) -> None:
        self._open.pop(branch, None)

    def undone(self, now_ms: int, xid: Any, branch: Any, _was_prepared: bool) -> None:
        if now_ms > self._open.pop(branch, now_ms) + self.MOST_MS:
            raise Violation(11, f"{xid}: branch {branch} held its locks long after its deadline")

    def rest(self, now_ms: int) -> None:
        stuck = {branch for branch, since_ms in self._open.items() if now_ms > since_ms + self.MOST_MS}
        if stuck:
            raise Violation(11, f"branches that never end: {stuck}")


class OneAnswer:
    """12: whoever asks, and however often, hears one outcome.

    A transaction that wrote nothing leaves no record: asked for it again after a restart, the coordinator presumes abort.  Nobody
    can tell the difference.
    """

    def __init__(self) -> None:
        self._answers: dict[Any, Outcome] = {}
        self._wrote: set[Any] = set()

    def wrote(self, _now_ms: int, xid: Any, _branch: Any, _call: Any, _process: Any) -> None:
        self._wrote.add(xid)

    def lost(self, _now_ms: int, xids: Iterable[Any]) -> None:
        """What was said about these has been heard, or nobody alive knows of it: `Truth` sees the difference."""
        for xid in xids:
            self._answers.pop(xid, None)

    def replied(self, _now_ms: int, xid: Any, outcome: Outcome) -> None:
        if outcome is _UNKNOWN or self._answers.setdefault(xid, outcome) is outcome:
            return
        if xid in self._wrote:
            raise Violation(12, f"{xid} is called {outcome.name} after it was called {self._answers[xid].name}")


class Truth:
    """13: what the application is told is what happened; UNKNOWN only where nobody can know."""

    def __init__(self) -> None:
        self._told: dict[Any, Outcome] = {}
        self._listed: dict[Any, tuple[Any, ...]] = {}
        self._wrote: set[Any] = set()
        self._damaged: set[Any] = set()
        self._committed: set[Any] = set()
        self._denied: set[Any] = set()
        self._crowded = False
        """Whether a decision may be gone: its log was full, or its register has come back older."""

    def deleted(self, _now_ms: int, _xid: Any, early: bool) -> None:
        self._crowded |= early

    def reborn(self, _now_ms: int) -> None:
        self._crowded = True

    def replied(self, _now_ms: int, xid: Any, outcome: Outcome) -> None:
        """Whoever asks, and however late: what is answered is what happened."""
        if outcome is _ABORTED:
            self._denied.add(xid)
            if xid in self._committed - self._damaged:
                raise Violation(13, f"somebody is told that {xid} is aborted, and it has committed")

    def told(self, _now_ms: int, xid: Any, outcome: Outcome) -> None:
        known = self._told.get(xid, _UNKNOWN)
        if known is not _UNKNOWN and outcome is not known:
            raise Violation(13, f"the application was told {known.name} of {xid}, and now {outcome.name}")
        self._told[xid] = outcome
        if outcome is _ABORTED and xid in self._committed:
            raise Violation(13, f"{xid} is called aborted, and has committed")

    def listed(self, _now_ms: int, xid: Any, branches: Iterable[Any]) -> None:
        self._listed[xid] = tuple(branches)

    def saw(self, _now_ms: int, xid: Any, _call: Any) -> None:
        self._wrote.add(xid)

    def committed(self, _now_ms: int, xid: Any, _branch: Any, _calls: Any, _was_prepared: bool) -> None:
        self._committed.add(xid)
        if xid in self._denied - self._damaged:
            raise Violation(13, f"{xid} commits after its abort was told")
        if self._told.get(xid) is _ABORTED:
            raise Violation(13, f"{xid} commits, and its application was told that it is aborted")

    def damaged(self, _now_ms: int, xid: Any, _branch: Any) -> None:
        self._damaged.add(xid)

    def rest(self, _now_ms: int) -> None:
        for xid, outcome in self._told.items():
            if outcome is _COMMITTED and xid in self._wrote - self._damaged and xid not in self._committed:
                raise Violation(13, f"the application was told that {xid} is committed, and it is not")
            if outcome is _UNKNOWN and len(self._listed.get(xid, ())) != 1 and not self._crowded:
                raise Violation(13, f"the application was never told how {xid} ended")


_CHECKERS: tuple[type[Any], ...] = (
    Agreement,
    Validity,
    DurableBeforeTold,
    Promises,
    PresumedAbort,
    NoEarlyForgetting,
    Fencing,
    WholeWork,
    LateMessages,
    Deadlines,
    OneAnswer,
    Truth,
    *IN_DOUBT,
)
