"""Hypothesis strategies for every message of the session."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from txrpc._protocol import deciding as d
from txrpc._protocol import messages as m
from txrpc._protocol.outcomes import Found
from txrpc._protocol.records import PreparedBranch
from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId, Epoch, Gid, ParticipantId, RegisterId, Xid

names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,20}[A-Za-z0-9])?", fullmatch=True)
xids = st.binary(min_size=16, max_size=16).map(Xid)
branch_ids = st.binary(min_size=8, max_size=8).map(BranchId)
participants = st.binary(min_size=8, max_size=8).map(ParticipantId)
epochs = st.integers(0, 2**63 - 1).map(Epoch)
owners = st.builds(m.Owner, names, epochs)
texts = st.text(max_size=60).filter(str.isprintable)
tokens = st.integers(0, 2**63).map(str) | st.just("")
reasons = st.builds(Reason, st.sampled_from(AbortCode), texts)
uint32 = st.integers(0, 2**32 - 1)
positions = st.integers(0, 2**63 - 1)
registers = st.binary(min_size=24, max_size=24).map(RegisterId)
some_register = st.none() | registers
gids = st.builds(Gid, names, names, epochs, xids, branch_ids, participants, names) | st.builds(
    Gid, names, st.just(""), st.just(Epoch(0)), xids, branch_ids, participants, names, registers
)
votes = st.sampled_from(m.Vote)
results = st.sampled_from(m.Outcome)
refs = st.builds(m.BranchRef, branch_ids, names, participants, uint32, st.none() | votes, tokens, uint32, some_register)
ref_lists = st.lists(refs, max_size=4, unique_by=lambda ref: ref.branch).map(tuple)
prepared = st.builds(PreparedBranch, branch_ids, participants, names, tokens)
prepared_lists = st.lists(prepared, max_size=4, unique_by=lambda each: each.branch).map(tuple)
resources = st.builds(m.ResourceInfo, names, texts, texts, texts, some_register)
some = st.booleans()
contexts = st.builds(
    m.TransactionContext, names, xids, owners, uint32, some, some, some, some_register, st.none() | prepared_lists
)
reports = st.builds(m.CallReport, ref_lists, st.none() | reasons, some)

to_coordinator: st.SearchStrategy[Any] = st.one_of(
    st.builds(
        m.Hello,
        uint32,
        names,
        participants,
        texts,
        st.lists(resources, max_size=3, unique_by=lambda r: r.name).map(tuple),
        st.none() | owners,
        positions,
        uint32,
    ),
    st.builds(
        m.CommitRequest,
        xids,
        epochs,
        uint32,
        ref_lists,
        uint32,
        st.sampled_from(m.Wait),
        some_register,
        st.none() | branch_ids,
    ),
    st.builds(m.RollbackRequest, xids, epochs, uint32, ref_lists, reasons, st.booleans()),
    st.builds(m.OutcomeRequest, xids, epochs, uint32, ref_lists, some_register),
    st.builds(m.Voted, xids, branch_ids, votes, st.none() | reasons, tokens, some_register),
    st.builds(m.Committing, xids, branch_ids, tokens),
    st.builds(m.OnePhaseDone, xids, branch_ids, results, st.none() | reasons),
    st.builds(m.Acked, xids, branch_ids, st.sampled_from(m.FinishResult), names),
    st.builds(m.Trouble, gids, st.none() | reasons),
    st.builds(m.Inquiry, gids, st.integers(0, 2**63), uint32),
    st.builds(m.Resolved, xids, branch_ids, results),
    st.builds(d.Decided, registers, xids, prepared_lists),
    st.builds(d.RegisterAnswer, registers, xids, st.sampled_from(Found), prepared_lists),
)

from_coordinator: st.SearchStrategy[Any] = st.one_of(
    st.builds(m.Welcome, owners, uint32, uint32, uint32, uint32, positions, uint32),
    st.builds(m.Tick, uint32, positions, uint32),
    st.builds(m.Prepare, xids, branch_ids, uint32),
    st.builds(m.CommitOnePhase, xids, branch_ids, uint32),
    st.builds(m.Commit, gids, tokens, positions),
    st.builds(m.Rollback, gids, reasons, tokens),
    st.builds(m.Abandon, xids, reasons),
    st.builds(m.Resolve, xids, branch_ids, names, tokens),
    st.builds(
        m.OutcomeReply,
        xids,
        st.sampled_from(m.Outcome),
        st.none() | reasons,
        st.lists(texts, max_size=3).map(tuple),
        texts,
        positions,
    ),
    st.builds(m.OnePhaseToken, xids, tokens),
    st.builds(d.Votes, xids, prepared_lists),
    st.builds(d.Registers, st.dictionaries(names, registers, max_size=3).map(lambda each: tuple(sorted(each.items())))),
    st.builds(d.Decide, xids, branch_ids, uint32, registers, prepared_lists),
    st.builds(d.RegisterQuestion, registers, xids, some, st.none() | prepared_lists),
    st.builds(d.DecisionDone, registers, st.lists(xids, max_size=3).map(tuple)),
    st.builds(m.GoAway, texts, texts, st.booleans()),
)
