"""One bank: a gRPC service with a database of its own, whose methods join the caller's transaction.

python -m examples.bank.service --listen 127.0.0.1:7501 --database postgresql+psycopg://... --coordinator 127.0.0.1:7400
"""

from __future__ import annotations

import argparse
import signal
from concurrent.futures import ThreadPoolExecutor

import grpc
from sqlalchemy import BigInteger, CheckConstraint, Engine, Integer, String, create_engine, func, insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import txrpc
import txrpc.sql
from examples.bank import bank_pb2, bank_pb2_grpc


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"
    __table_args__ = (CheckConstraint("cents >= 0", name="no_debt"),)
    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    cents: Mapped[int] = mapped_column(BigInteger)


class Entry(Base):
    """The journal: which transaction changed which account, by how much."""

    __tablename__ = "journal"
    number: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    xid: Mapped[str] = mapped_column(String(32), index=True)
    account: Mapped[str] = mapped_column(String(40))
    cents: Mapped[int] = mapped_column(BigInteger)


class Accounts(bank_pb2_grpc.AccountsServicer):
    """Nothing here knows about two-phase commit: the decorator joins, the session is bound to the transaction."""

    def __init__(self, database: txrpc.sql.ResourceManager) -> None:
        self.database = database

    @txrpc.transactional
    def Withdraw(self, request: bank_pb2.Amount, context: grpc.ServicerContext) -> bank_pb2.Balance:
        return self._add(request.account, -request.cents, context)

    @txrpc.transactional
    def Deposit(self, request: bank_pb2.Amount, context: grpc.ServicerContext) -> bank_pb2.Balance:
        return self._add(request.account, request.cents, context)

    @txrpc.transactional(read_only=True)
    def Total(self, request: bank_pb2.TotalRequest, context: grpc.ServicerContext) -> bank_pb2.Balance:
        with self.database.session() as session:
            return bank_pb2.Balance(cents=int(session.scalar(select(func.sum(Account.cents))) or 0))

    def _add(self, name: str, cents: int, context: grpc.ServicerContext) -> bank_pb2.Balance:
        with self.database.session() as session:
            account = session.get(Account, name, with_for_update=True)
            if account is None:
                context.abort(grpc.StatusCode.NOT_FOUND, f"there is no account {name}")
            if account.cents + cents < 0:
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{name} has only {account.cents} cents")
            account.cents += cents
            session.add(Entry(xid=_xid(), account=name, cents=cents))
            return bank_pb2.Balance(cents=account.cents)


def _xid() -> str:
    transaction = txrpc.current_transaction()
    return str(transaction.xid) if transaction else ""


def open_bank(url: str, accounts: int, cents: int) -> Engine:
    """Make the tables, and *accounts* if there are none."""
    engine = create_engine(url, pool_size=20)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        if accounts and not connection.scalar(select(func.count()).select_from(Account)):
            rows = [{"name": f"{i:04}", "cents": cents} for i in range(accounts)]
            connection.execute(insert(Account), rows)
    return engine


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", required=True)
    parser.add_argument("--database", required=True)
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--name", default="accounts", help="of the resource: one a database")
    parser.add_argument("--accounts", type=int, default=0, help="make this many accounts if there are none")
    parser.add_argument("--cents", type=int, default=100_000, help="in each of them")
    parser.add_argument(
        "--decides", action="store_true", help="let this bank's database decide, where a call asks it to"
    )
    arguments = parser.parse_args()

    # Before any thread starts, which all inherit it: the signals wait for `sigwait`.
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    engine = open_bank(arguments.database, arguments.accounts, arguments.cents)
    database = txrpc.sql.ResourceManager(arguments.name, engine, decides=arguments.decides)
    with txrpc.connect(arguments.coordinator, resources=[database], process=f"bank service {arguments.name}"):
        server = grpc.server(ThreadPoolExecutor(16), interceptors=txrpc.server_interceptors())
        bank_pb2_grpc.add_AccountsServicer_to_server(Accounts(database), server)
        server.add_insecure_port(arguments.listen)
        server.start()
        print("serving", arguments.listen, flush=True)
        signal.sigwait(signals)
        server.stop(grace=5).wait()


if __name__ == "__main__":
    main()
