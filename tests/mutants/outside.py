"""One mistake each in sql, log, group, client, rpc and coordinator; and the tests of `make test` that are to notice it."""

from __future__ import annotations

from tests.mutation import Change

__all__ = ["MUTANTS"]

_SQL, _LOG, _GROUP, _RPC = "txrpc.sql.", "txrpc._decision_log.", "txrpc._group.", "txrpc._grpc."
_ETCD = "txrpc._etcd."

MUTANTS: dict[str, tuple[Change, str]] = {
    "a vote is taken from whatever backend answers": (
        Change(_SQL + "postgresql", "if backend != pid or not in_block:", "if False:"),
        "tests/sql/test_hazards.py -k moved",
    ),
    "a transaction id is compared in any history": (
        Change(_SQL + "postgresql", "if present != timeline:", "if False:"),
        "tests/sql/test_promises.py -k a_token_that_proves_nothing",
    ),
    "an id that the database has not come to proves nothing": (
        Change(_SQL + "postgresql", "return _AHEAD", 'return ""'),
        "tests/sql/test_promises.py -k a_token_that_proves_nothing",
    ),
    "a branch is finished under one's own role only": (
        Change(_SQL + "postgresql", 'if sqlstate(error) != "42501" or not', "if True or not"),
        "tests/sql/test_promises.py -k took_another_role",
    ),
    "a cancelled wait for a standby is a vote": (
        Change(_SQL + "postgresql", "        if cancelled:\n            raise", "        if False:\n            raise"),
        "tests/sql/test_replication.py -k is_no_vote",
    ),
    "a backend is known by its process id alone": (
        Change(
            _SQL + "backend",
            "AND backend_start <= clock_timestamp() - make_interval(secs => {age_s:.3f})",
            "AND {age_s:.3f} >= 0",
        ),
        "tests/sql/test_workers.py -k same_process_id",
    ),
    "a connection that is being broken off goes back to the pool": (
        Change(_SQL + "common", "return not self.interrupted", "return True"),
        "tests/sql/test_workers.py -k while_its_interrupt",
    ),
    "whoever has the connection next is broken off": (
        Change(_SQL + "common", "if work.backend is None or work.given_back:", "if work.backend is None:"),
        "tests/sql/test_workers.py -k comes_too_late",
    ),
    "the driver's own commit is not seen": (
        Change(_SQL + "common", "        work.began = True\n", ""),
        "tests/sql/test_sessions.py -k drivers_own",
    ),
    "a session's rollback without a statement is not seen": (
        Change(_SQL + "sessions", '    event.listen(session, "after_soft_rollback", rolled_back)\n', ""),
        "tests/sql/test_sessions.py -k whatever_it_had_done",
    ),
    "a resource commits by itself where calls are served": (
        Change(_SQL + "outside", 'if outside == "local" or (outside is None and not serves):', "if True:"),
        "tests/system/test_no_silent_half.py -k without_the_transaction",
    ),
    "a decision is taken below the floor": (
        Change(
            _SQL + "postgresql_register",
            "Verdict.DECIDED if floor is not None and xid > floor else",
            "Verdict.DECIDED if floor is not None else",
        ),
        "tests/sql/test_register.py -k v1_v2_v3",
    ),
    "a claim is taken below the floor": (
        Change(
            _SQL + "postgresql_register",
            "written(commit) if floor is not None and xid > floor else",
            "written(commit) if floor is not None else",
        ),
        "tests/sql/test_register.py -k v1_v2_v3",
    ),
    "a decision without work that lists no branch is never done": (
        Change(
            _SQL + "postgresql_register",
            "true, {_bytes(commit)}, {'false' if commit else 'true'}",
            "true, {_bytes(commit)}, false",
        ),
        "tests/sql/test_register.py -k row_alone",
    ),
    "a decision without work is taken for a refusal": (
        Change(
            _SQL + "register",
            "return Row(Found.ABORTED) if commit is None else",
            "return Row(Found.ABORTED) if True else",
        ),
        "tests/sql/test_register.py -k row_alone",
    ),
    "a server's crash may undo a decision without work": (
        Change(_SQL + "mysql_register", "if commit is not None and not is_durable(connection):", "if False:"),
        "tests/sql/mysql/test_register.py -k without_work_that_a_crash",
    ),
    "what was begun before a fail-over is decided after it": (
        Change(_SQL + "deciding", "    if under != register.id:", "    if False:"),
        "tests/sql/test_deciding.py -k v15",
    ),
    "a decision that may be lost is called aborted": (
        Change(_SQL + "deciding", "(register.ask, under, xid, True)", "(register.ask, register.id, xid, True)"),
        "tests/sql/test_deciding.py -k v15",
    ),
    "a decision reads the floor in an old snapshot": (
        Change(_SQL + "postgresql_register", " FOR SHARE", " FOR KEY SHARE"),
        "tests/sql/test_register.py -k v4",
    ),
    "a decision is deleted before it is done": (
        Change(_SQL + "postgresql_register", "(done OR NOT committed)", "(done OR true)"),
        "tests/sql/test_register.py -k v1_what_is_not_done",
    ),
    "a refusal is deleted above the floor": (
        Change(
            _SQL + "postgresql_register",
            "WHERE xid <= (SELECT floor FROM {self.table})",
            "WHERE xid <= (SELECT id FROM {self.table}) OR NOT committed",
        ),
        "tests/sql/test_register.py -k only_rises",
    ),
    "any register takes a decision": (
        Change(
            _SQL + "postgresql_register", "if row is None or register_id(row[0], row[2]) != self.id:", "if row is None:"
        ),
        "tests/sql/test_register.py -k v14",
    ),
    "any incarnation takes a claim": (
        Change(
            _SQL + "postgresql_register", "return None if register_id(*row) == self.id else Found.LOST", "return None"
        ),
        "tests/sql/test_register.py -k v15",
    ),
    "a claim from below the floor waits for no one": (
        Change(
            _SQL + "postgresql_register",
            "        if inserted is None:\n            return self._row(connection, xid)",
            "        if inserted is None:\n            return Row(Found.FORGOTTEN)",
        ),
        "tests/sql/test_register.py -k v6",
    ),
    "a decision may be lost in a crash": (
        Change(
            _SQL + "postgresql_register",
            "CASE WHEN current_setting('synchronous_commit') = 'off' THEN",
            "CASE WHEN false THEN",
        ),
        "tests/sql/test_register.py -k rule_22",
    ),
    "whatever backend is there writes the decision": (
        Change(
            _SQL + "postgresql_register", "WHERE pg_backend_pid() = {int(pid)} AND now() <> statement_timestamp() ", ""
        ),
        "tests/sql/test_register.py -k v11",
    ),
    "a file's branch is committed by whatever transaction is open": (
        Change(_SQL + "sqlite", "    prove(connection)\n    if connection", "    if connection"),
        "tests/sql/test_sqlite.py -k drivers_own",
    ),
    "a file is asked for a branch that may still commit": (
        Change(_SQL + "sqlite_file", "BEGIN IMMEDIATE", "BEGIN"),
        "tests/sql/test_sqlite.py -k went_away",
    ),
    "a marker that is not there proves an abort in any file": (
        Change(_SQL + "sqlite", "is_known = file == incarnation(connection) and", "is_known ="),
        "tests/sql/test_sqlite.py -k not_the_one",
    ),
    "a marker that was forgotten proves an abort": (
        Change(_SQL + "sqlite", "< _KEPT_MS / 2", "> 0"),
        "tests/sql/test_sqlite.py -k not_the_one",
    ),
    "a file's connection goes back to the pool unable to write": (
        Change(_SQL + "common", "if work is not None and work.read_only:", "if False:"),
        "tests/sql/test_sqlite.py -k may_only_read",
    ),
    "whatever transaction is open decides in a file": (
        Change(_SQL + "sqlite_register", "        prove(connection)\n", ""),
        "tests/sql/test_sqlite_register.py -k v11",
    ),
    "a file decides below the floor": (
        Change(_SQL + "sqlite_register", "misfit is None and xid > floor and", "misfit is None and"),
        "tests/sql/test_sqlite_register.py -k v1_v2_v3",
    ),
    "a claim is taken below a file's floor": (
        Change(_SQL + "sqlite_register", "if xid <= floor:", "if False:"),
        "tests/sql/test_sqlite_register.py -k v1_v2_v3",
    ),
    "any file of that name takes a decision": (
        Change(_SQL + "sqlite_file", 'return f"{Path(_path(connection)).stat().st_ino:x}"', 'return "1"'),
        "tests/sql/test_sqlite_register.py -k v15",
    ),
    "a file's decision may be lost when the power fails": (
        Change(_SQL + "sqlite_register", " and is_durable(connection)", ""),
        "tests/sql/test_sqlite_register.py -k rule_22",
    ),
    "a branch of MariaDB is marked in whatever session there is": (
        Change(_SQL + "mysql", " FROM DUAL WHERE CONNECTION_ID() = {int(pid)}", ""),
        "tests/sql/mysql/test_branches.py -k was_moved",
    ),
    "a branch of MariaDB is undone after its vote": (
        Change(_SQL + "mysql", "    connection.info.pop(_INFO)  # from here on nothing here may undo it\n", ""),
        "tests/sql/mysql/test_connections.py -k stays_if",
    ),
    "what is prepared in MariaDB by a frozen process is taken for ended": (
        Change(_SQL + "mysql_finishing", "if number not in recover(connection):", "if True:"),
        "tests/sql/mysql/test_connections.py -k was_stopped",
    ),
    "a frozen process keeps its branch in MariaDB": (
        Change(_SQL + "mysql_finishing", 'f"KILL {int(row[2])}"', '"DO 0"'),
        "tests/sql/mysql/test_connections.py -k was_stopped",
    ),
    "a branch of MariaDB's is finished while its connection is being closed": (
        Change(_SQL + "mysql", "FINISHES_WHERE_PREPARED: Final = True", "FINISHES_WHERE_PREPARED: Final = False"),
        "tests/sql/mysql/test_connections.py -k connection_that_prepared",
    ),
    "MariaDB's word for a branch's end is taken": (
        Change(
            _SQL + "mysql_finishing",
            "proof = _who_ended_it(connection, commit, number, markers)",
            "proof = FinishResult.DONE",
        ),
        "tests/sql/mysql/test_connections.py -k row_agrees",
    ),
    "connections of prepared branches are kept without a bound": (
        Change(_SQL + "kept", "while len(self._kept) > (0 if self.closed else _MOST):", "while False:"),
        "tests/sql/mysql/test_connections.py -k up_to_a_bound",
    ),
    "a connection that was free for a while is not looked at": (
        Change(_SQL + "mysql_finishing", "if dialect.do_ping(driver):", "if driver:"),
        "tests/sql/mysql/test_connections.py -k broke_while",
    ),
    "a connection that was free for a while has another isolation level": (
        Change(_SQL + "mysql_finishing", 'if "isolation_level" in options:', "if False:"),
        "tests/sql/mysql/test_connections.py -k level",
    ),
    "a connection is kept although the resource was closed": (
        Change(_SQL + "kept", "        self.closed = True\n", ""),
        "tests/sql/mysql/test_connections.py -k outlasts",
    ),
    "MariaDB is asked for a branch that may still commit": (
        Change(_SQL + "mysql_finishing", " FOR UPDATE NOWAIT", ""),
        "tests/sql/mysql/test_branches.py -k went_away",
    ),
    "a branch that is gone from MariaDB has committed": (
        Change(_SQL + "mysql_finishing", "FinishResult.LOST if commit", "FinishResult.ALREADY if commit"),
        "tests/sql/mysql/test_branches.py -k rolled_back_by_any",
    ),
    "others' branches in MariaDB are ours": (
        Change(_SQL + "mysql_finishing", "gid is not None and gid.group == group", "gid is not None"),
        "tests/sql/mysql/test_branches.py -k left_alone",
    ),
    "a pool gets a connection of MariaDB with a branch on it": (
        Change(_SQL + "mysql", "ROLLBACK_IS_REFUSED: Final = True", "ROLLBACK_IS_REFUSED: Final = False"),
        "tests/sql/mysql/test_branches.py -k gives_a_good",
    ),
    "a session of an earlier run of MariaDB is ended": (
        Change(_SQL + "mysql_sessions", "if uptime_s + 2 <", "if False and uptime_s + 2 <"),
        "tests/sql/mysql/test_branches.py -k earlier_run",
    ),
    "whatever session decides in MariaDB": (
        Change(_SQL + "mysql_register", 'f"FROM DUAL WHERE CONNECTION_ID() = {int(pid)}"', '"FROM DUAL"'),
        "tests/sql/mysql/test_register.py -k v11",
    ),
    "a snapshot of MariaDB's shows an old floor": (
        Change(
            _SQL + "mysql_register",
            "self._look(connection, _LATEST)\n        is_fit",
            "self._look(connection)\n        is_fit",
        ),
        "tests/sql/mysql/test_register.py -k v4",
    ),
    "a claim is taken below MariaDB's floor": (
        Change(_SQL + "mysql_register", "misfit is not None or xid <= floor", "misfit is not None"),
        "tests/sql/mysql/test_register.py -k v1_v2_v3",
    ),
    "any server of MariaDB takes a decision": (
        Change(_SQL + "mysql_register", 'return "@@server_id" if', 'return "1" if'),
        "tests/sql/mysql/test_register.py -k v15",
    ),
    "MariaDB's decision may be lost in a crash": (
        Change(_SQL + "mysql_register", " and is_durable(connection)", ""),
        "tests/sql/mysql/test_register.py -k rule_22",
    ),
    "a COMMIT without an answer is an abort": (
        Change(
            _SQL + "deciding",
            "        return (yield from settle(hands, register, work, xid, under))\n    except BaseException",
            "        return Decided.ABORTED\n    except BaseException",
        ),
        "tests/sql/test_deciding.py -k answer_was_lost",
    ),
    "a decision that is in MariaDB's log is not looked at": (
        Change(_LOG + "upserts", "return backend not in _ON_DUPLICATE", "return True"),
        "tests/log/test_contract.py -k mariadb and never_changes",
    ),
    "a node of MariaDB's log is another one in small letters": (
        Change(_LOG + "schema", 'collation="ascii_bin"', 'collation="ascii_general_ci"'),
        "tests/log/test_mysql.py -k case",
    ),
    "a takeover in MariaDB reads what is older than its lock": (
        Change(_LOG + "database", "ISOLATION LEVEL READ COMMITTED", "ISOLATION LEVEL REPEATABLE READ"),
        "tests/log/test_mysql.py -k rule_14",
    ),
    "a frozen coordinator keeps MariaDB's log": (
        Change(
            _LOG + "database",
            '{setting}")\n    connection.commit()\n\n\ndef warn',
            '{setting}") if 0 else 0\n    connection.commit()\n\n\ndef warn',
        ),
        "tests/log/test_mysql.py -k froze",
    ),
    "the log's fence compares nothing": (
        Change(_LOG + "recording", "if row is None or row.epoch != self.epoch:", "if row is None:"),
        "tests/log/test_contract.py -k rule_7",
    ),
    "no answer to COMMIT means not recorded": (
        Change(_LOG + "sql", "if attempt.sent and not was_refused(error):", "if False:"),
        "tests/log/test_sql.py -k uncertain",
    ),
    "PostgreSQL's log is not fenced": (
        Change(_LOG + "recording", 'AND epoch = :epoch "', 'AND :epoch > 0 "'),
        "tests/log/test_contract.py -k rule_7",
    ),
    "SQLite's log is not fenced": (
        Change(_LOG + "recording", "if epoch != self._fence.epoch:", "if epoch is None:"),
        "tests/log/test_contract.py -k rule_7",
    ),
    "SQLite's log stands still": (
        Change(_LOG + "recording", "(position + len(rows), self._fence.node)", "(position, self._fence.node)"),
        "tests/log/test_contract.py -k rule_18",
    ),
    "SQLite changes a decision": (
        Change(_LOG + "recording", 'DO NOTHING"', 'DO UPDATE SET branches = excluded.branches"'),
        "tests/log/test_contract.py -k never_changes",
    ),
    "PostgreSQL's log stands still": (
        Change(_LOG + "recording", "position + :count", "position + 0 * :count"),
        "tests/log/test_contract.py -k rule_18",
    ),
    "PostgreSQL changes a decision": (
        Change(_LOG + "recording", "THEN held.branches END", "THEN held.branches ELSE excluded.branches END"),
        "tests/log/test_contract.py -k never_changes",
    ),
    "what PostgreSQL refuses may have been recorded": (
        Change(_LOG + "database", "return refused(error) or", "return"),
        "tests/log/test_sql.py -k refuses",
    ),
    "a backend that was ended has said no": (
        Change(
            "txrpc._sqlstate", "and bool(sqlstate(error)) and not connection_lost(error)", "and bool(sqlstate(error))"
        ),
        "tests/log/test_sql.py -k is_ended",
    ),
    "the log's position stands still": (
        Change(_LOG + "recording", "self._fence.lock(connection) + len(rows)", "self._fence.lock(connection)"),
        "tests/log/test_contract.py -k rule_18 and mariadb",
    ),
    "an incident is closed for good": (
        Change(_LOG + "sql", '("finish", "at_ms", "closed_ms")', '("finish", "at_ms")'),
        "tests/log/test_contract.py -k comes_back",
    ),
    "finishing waits behind PREPARE": (
        Change(
            "txrpc._client.client",
            "self._finishers if do.operation in effects.FINISHING else self._workers",
            "self._workers",
        ),
        "tests/sql/test_workers.py -k f9",
    ),
    "a commit whose connection broke is asked about once": (
        Change("txrpc._client.effects", "branch.questions == len(_ASK_AFTER_S)", "branch.questions == 1"),
        "tests/runtime/test_ending.py -k rule_20",
    ),
    "a branch is rolled back while the server keeps its end of a connection that broke": (
        Change("txrpc._client.branch_operation", "return ended or Later", "return result or Later"),
        "tests/runtime/test_ending.py -k leave_behind",
    ),
    "each transaction waits for connections in an order of its own": (
        Change("txrpc._client.scope", "for name in sorted(found)", "for name in found"),
        "tests/sql/test_admission.py -k one_order",
    ),
    "a transaction waits for the one around it": (
        Change("txrpc._client.branches", "for xid in part.around]", "for xid in ()]"),
        "tests/sql/test_admission.py -k at_once",
    ),
    "the work of ended branches is kept": (
        Change("txrpc._client.effects", "client.branches.pop(do.gid.branch, None)", "pass"),
        "tests/runtime/test_scopes.py",
    ),
    "a greater position is forgotten": (
        Change("txrpc._client.core", "known.position = max(known.position, message.position)", "pass"),
        "tests/system/test_restored_log.py -k rule_18",
    ),
    "calls in flight are left to their deadline": (
        Change("txrpc._client.completion", "everywhere = bool(part.in_flight)", "everywhere = False"),
        "tests/system/test_calls_in_flight.py -k rule_9_a_call_that_still_runs",
    ),
    "a second program may embed a coordinator with the same file": (
        Change("txrpc._embedded_session", "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
        "tests/system/test_embedded.py -k refused_while",
    ),
    "a lost early vote is left to its deadline": (
        Change("txrpc._client.completion", "bool(part.in_flight) or part.lost_vote", "bool(part.in_flight)"),
        "tests/system/test_final_calls.py -k rule_19",
    ),
    "a failed final call votes all the same": (
        Change(
            "txrpc._client.transaction_base",
            "if self._failed or self._part.doom is not None:",
            "if self._part.doom is not None:",
        ),
        "tests/system/test_final_calls.py -k failed",
    ),
    "a fan-out in a service is left to its deadline": (
        Change(
            "txrpc._client.transaction_base",
            "        if self._part.in_flight:\n            self._abandon()\n",
            "",
        ),
        "tests/system/test_calls_in_flight.py -k rule_19",
    ),
    "a server that takes no part is good enough": (
        Change(
            _RPC + "shared",
            "        if report is not None:\n            out.replied",
            "        if True:\n            out.replied",
        ),
        "tests/rpc/test_interceptor_ends.py -k takes_no_part",
    ),
    "a call's end is known whoever said it": (
        Change(_RPC + "shared", "if not end_is_known(trailing):", "if False:"),
        "tests/rpc/test_interceptor_ends.py",
    ),
    "a call outlives its transaction": (
        Change(_RPC + "shared", "min(timeout, time_left_s)", "timeout"),
        "tests/rpc/test_interceptors.py -k other_options",
    ),
    "a member becomes one again, as another": (
        Change(_GROUP + "founding", "if standing.stage == MEMBER:", "if False:"),
        "tests/log/test_group.py -k stays_one",
    ),
    "a disk from a backup votes": (
        Change(_GROUP + "heartbeats", "remembered.saves <= self._acceptor.saves:", "True:"),
        "tests/log/test_group.py -k from_a_backup_does_not_vote",
    ),
    "what was sent and not answered was not recorded": (
        Change(_GROUP + "log", "            raise RecordUncertain(", "            raise NotRecorded("),
        "tests/log/test_group.py -k has_lost_its_disk",
    ),
    "etcd is written to in an epoch that is over": (
        Change(
            _ETCD + "writer",
            "pb.EtcdCompare(target=pb.EtcdCompare.VALUE, key=self._keys.node, value=self.fence),",
            "",
        ),
        "tests/log/test_contract.py -k rule_7_every_write",
    ),
    "a late write to etcd is carried out": (
        Change(
            _ETCD + "writer",
            "mod_revision=self.revision),\n            ],",
            "mod_revision=self.revision),\n            ][:1],",
        ),
        "tests/log/test_etcd.py -k comes_late",
    ),
    "what etcd has had no space for is never written": (
        Change(_ETCD + "writer", "if self._look() == wanted:", "if False:"),
        "tests/log/test_etcd.py -k that_is_full_has",
    ),
    "what etcd does not answer was not recorded": (
        Change(_ETCD + "log", "if began or not isinstance(error, EtcdRefused):", "if False:"),
        "tests/log/test_etcd.py -k not_answered_at_all",
    ),
    "an acceptor forgets in which view it was asked": (
        Change(_GROUP + "disk", "base.slot, base.position, disk.view)", "base.slot, base.position, 1)"),
        "tests/log/test_membership.py -k in_no_view_earlier",
    ),
    "a younger log begins with the disks of the founders": (
        Change(_GROUP + "acceptor", "dict(view.born.get(log, {})) if view else {}", "{}"),
        "tests/log/test_membership.py -k no_founder",
    ),
    "a member is added that is not there": (
        Change(_GROUP + "changes", "                self._greet(name, address)", "                pass"),
        "tests/log/test_membership.py -k never_comes_up",
    ),
    "a change is made that the group cannot bear": (
        Change(_GROUP + "changes", "        self._check_bearable(now, following)", "        pass"),
        "tests/log/test_membership.py -k leave_no_quorum",
    ),
    "that a repeat was not recorded is believed": (
        Change(
            "txrpc._coordinator.log_writer",
            "if attempt == 0 and isinstance(error, NotRecorded):",
            "if isinstance(error, NotRecorded):",
        ),
        "tests/coordinator/test_engine.py",
    ),
    "a log that has lost decisions goes on deciding": (
        Change("txrpc._coordinator.driver", "        if out.behind:\n", "        if False:\n"),
        "tests/system/test_restored_log.py -k rule_18",
    ),
    "what has no open transaction is not shown": (
        Change("txrpc._coordinator.in_doubt", "in core.state.reports.shown(now_ms):", "in ():"),
        "tests/system/test_trouble.py -k perhaps_prepared",
    ),
}
"""The change, and arguments for pytest."""
