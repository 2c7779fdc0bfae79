"""A proposer with its messages: one epoch of a replicated log, for callers that wait.

How to think of it
    `txrpc._protocol.quorum.proposer` says what to send and what an answer means; here it is sent, to the acceptor in this process
    and to those of the peers, and waited for.  What is lost is asked again.

    A command that was sent stays in flight until a quorum has it, whether or not its caller has given up waiting: the next one
    is proposed only then.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Final

from txrpc._group.acceptor import DiskTrouble, LocalAcceptor, blank
from txrpc._group.peers import Peers
from txrpc._protocol.quorum.acceptor import Question
from txrpc._protocol.quorum.commands import Admit, Command, LogState
from txrpc._protocol.quorum.proposer import Proposer, ProposerOutput, Stage
from txrpc._protocol.quorum.views import Quorums
from txrpc._wire.commands import view_from
from txrpc._wire.peer import answer_from, question_to
from txrpc._wire.v1 import peer_pb2
from txrpc.errors import BadMessage, ConfigurationError, Fenced
from txrpc.ids import Epoch

__all__ = ["NoQuorum", "Replica"]

_AGAIN_S: Final = 0.25
_OPEN_S: Final = 5.0
_ATTEMPTS: Final = 20
_EVERYONE: Final = 10


class NoQuorum(ConfigurationError):
    """Too few members of the group answer; it will be as it was when they are back."""


class Replica:
    """See the module's docstring.  One thread at a time; may block, for as long as a caller says."""

    def __init__(self, log: str, acceptor: LocalAcceptor, peers: Peers) -> None:
        self._log = log
        self._acceptor = acceptor
        self._peers = peers
        self._inbox = peers.inbox()
        self._proposer = Proposer(Epoch(0), peers.view.quorums)  # none yet: it asks nothing, and no answer is for it
        self._rounds = 0
        self._fenced_by = Epoch(0)
        self.in_flight: Command | None = None

    @property
    def state(self) -> LogState:
        """What is chosen for certain."""
        return self._proposer.state

    @property
    def epoch(self) -> Epoch:
        """The one that `open` has opened."""
        return self._proposer.epoch

    @property
    def is_open(self) -> bool:
        """Return whether it may propose: `open` has succeeded, and no later epoch is known."""
        return self._proposer.stage is Stage.OPEN

    def open(self, nonce: int, holder: str, expect: Epoch | None = None) -> None:
        """Open an epoch that is higher than all others.

        Raises `Fenced` if the latest is not the one to *expect*, and `NoQuorum`.
        """
        try:
            known = self._acceptor.state(self._log).result()
        except DiskTrouble:  # the others' disks have it
            known = blank(self._peers.view, self._log)
        number, until = known.epoch.number + 1, self._inbox.now_s() + _OPEN_S
        self.in_flight = None
        for _ in range(_ATTEMPTS):
            epoch = Epoch.make(number, nonce)
            self._proposer = Proposer(epoch, self._peers.view.quorums, holder, known.copy(), expect)
            out = self._exchange(self._proposer.start(), lambda out: out.opened, until)
            if out is None:
                raise NoQuorum(self._peers.too_few())
            if out.opened:
                self.tend()
                return
            if out.unexpected is not None:
                raise Fenced(f"node {self._log!r} is not in epoch {expect} any more")
            assert out.fenced is not None
            number = out.fenced.number + 1
            self._inbox.sleep(random.random() * 0.1)  # another one is opening it at the same time
        raise NoQuorum(f"others have opened the log of {self._log!r} again and again")

    def propose(self, command: Command, patience_s: float) -> bool:
        """Put *command* into the log; whether a quorum has it by now.  If not it stays in flight: see `wait`.

        Nothing may be in flight.  Raises `Fenced`: whether the command is in the log is then not known.
        """
        self._check()
        self.in_flight = command
        return self._settle(self._proposer.propose(command), patience_s)

    def wait(self, patience_s: float) -> bool:
        """Wait until nothing is in flight; whether that is so.  Raises `Fenced` as `propose`."""
        self._check()
        self._keep_up()
        until = self._inbox.now_s() + patience_s
        while not self._proposer.idle:  # behind a command the log may have to move to another view
            if not self._settle(self._proposer.again(), until - self._inbox.now_s()):
                return False
        return True

    def tend(self) -> None:
        """Hear what has come late, tell all what is chosen, and let in who has come with another disk.  Does not wait for answers.

        Raises `Fenced`.
        """
        self._check()
        self._exchange(ProposerOutput(), lambda _: False, self._inbox.now_s())
        self._check()
        self._keep_up()
        if not self._proposer.idle:
            self._send(self._proposer.again().send)
            return
        for member, incarnation in self._proposer.strangers.items():
            self.in_flight = Admit(member, incarnation)
            self._send(self._proposer.propose(self.in_flight).send)
            return
        self._rounds += 1
        # All, now and then: one that has lost its disk meanwhile shows it only when it is asked.
        self._send(self._proposer.learn(everyone=self._rounds % _EVERYONE == 0).send)

    def look(self, quorums: Quorums, patience_s: float) -> LogState | None:
        """Return what is chosen in the log for certain, as read from a quorum, without a promise; None if too few answer."""
        known = blank(self._peers.view, self._log)
        self._proposer = Proposer(Epoch.make(1, random.getrandbits(32)), quorums, "", known, expect=Epoch(0))
        until = self._inbox.now_s() + patience_s
        out = self._exchange(self._proposer.start(), lambda _: False, until)
        return self._proposer.state if out is not None and out.unexpected is not None else None

    # ------------------------------------------------------------------------------------------------------ messages

    def _keep_up(self) -> None:
        """Go on in the view that this process has heard of last."""
        if self._peers.view.number > self._proposer.view:
            self._send(self._proposer.move(self._peers.view.quorums).send)

    def _check(self) -> None:
        if self._proposer.stage is Stage.OVER:
            raise Fenced(f"epoch {self.epoch} of {self._log!r} is over: {self._fenced_by} has opened the log")

    def _settle(self, out: ProposerOutput, patience_s: float) -> bool:
        ended = self._exchange(out, lambda out: out.chosen is not None, self._inbox.now_s() + patience_s)
        self._check()
        return ended is not None

    def _exchange(
        self, out: ProposerOutput, enough: Callable[[ProposerOutput], bool], until: float
    ) -> ProposerOutput | None:
        """Send and receive until an output is *enough*, or ends the epoch, which is returned; None when the time is over."""
        again = self._inbox.now_s() + _AGAIN_S
        while True:
            self._send(out.send)
            if out.chosen is not None:
                self.in_flight = None
            if out.fenced is not None:
                self._fenced_by = out.fenced
            if out.outdated:
                self._keep_up()
            if enough(out) or out.fenced is not None or out.unexpected is not None:
                return out
            answer = self._inbox.get(min(until, again) - self._inbox.now_s())
            if answer is not None:
                out = self._proposer.received(answer)
            elif self._inbox.now_s() >= until:
                return None
            else:
                again = self._inbox.now_s() + _AGAIN_S
                out = self._proposer.again()

    def _send(self, messages: Sequence[tuple[str, Question]]) -> None:
        encoded: dict[int, peer_pb2.PeerQuestion] = {}
        for member, question in messages:
            if member == self._acceptor.name:
                self._acceptor.ask(self._log, question).add_done_callback(self._heard)
                continue
            message = encoded.get(id(question))
            if message is None:
                fields: Any = question_to(question)
                message = peer_pb2.PeerQuestion(group=self._peers.label(), log=self._log, **fields)
                encoded[id(question)] = message
            self._peers.ask(member, message, self._reader(member, question.epoch))

    def _heard(self, future: Any) -> None:
        if future.exception() is None:  # what is wrong with the disk was logged
            self._inbox.put(future.result())

    def _reader(self, member: str, epoch: Epoch) -> Callable[[Any], None]:
        def read(message: Any) -> None:
            try:
                if message.WhichOneof("answer") == "outdated":
                    self._peers.adopt(view_from(message.outdated.latest))
                self._inbox.put(answer_from(member, epoch, message))
            except BadMessage as error:
                self._peers.trouble[member] = f"its answer makes no sense: {error}"

        return read
