"""What the client of a cell does: python -m tests.system.scenarios COORDINATOR DEED VICTIM BANK BANK prints how it ended."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

import grpc

import txrpc
from examples.bank import bank_pb2
from examples.bank.teller import Teller
from txrpc._failpoints import FailpointError

CENTS = 7
REFUSED, SLOW = "0013", "0001"
"""Accounts whose change is refused at the end of the transaction, and whose change takes a while to commit."""


class _GiveUp(Exception):
    """The business logic changes its mind."""


def carry_out(scenario: str, victim: str, banks: Sequence[str], timeout_s: float) -> tuple[str, str]:
    """Do it through the manager that is connected; the transaction's XID, and what this client was told."""
    teller = Teller(banks)
    first, second = teller.banks
    other, here = (first, second) if victim == "bank-b" else (second, first)
    xid = ""
    try:
        with txrpc.transaction(timeout=timeout_s) as tx:
            xid = str(tx.xid)
            match scenario:
                case "one branch":
                    here.Deposit(_amount("0000"))
                case "final calls":
                    with txrpc.final_call():
                        first.Withdraw(_amount("0000"))
                        second.Deposit(_amount("0000"))
                case "one slow branch":
                    here.Deposit(_amount(SLOW))
                case "ends with a call in flight":
                    here.Withdraw(_amount("0000"))
                    other.Deposit.future(_amount("0000"))
                case "refused elsewhere":
                    here.Withdraw(_amount("0000"))
                    other.Deposit(_amount(REFUSED))
                case _:
                    first.Withdraw(_amount("0000"))
                    second.Deposit(_amount("0000"))
            if scenario == "give up":
                raise _GiveUp
        return xid, "committed"
    except txrpc.OutcomeUnknown:
        return xid, "unknown"
    except (txrpc.TransactionAborted, txrpc.CallsInFlight, txrpc.Unavailable, grpc.RpcError, FailpointError, _GiveUp):
        return xid, "aborted"
    finally:
        teller.close()


def _amount(account: str) -> bank_pb2.Amount:
    return bank_pb2.Amount(account=account, cents=CENTS)


def what_it_was_told(output: str) -> tuple[str, str]:
    """The XID and the end that a client wrote: ``"nothing"`` if it died before, or while it was writing."""
    found = re.search(r"^told (\S*) (\w+)\n", output, re.MULTILINE)
    return (found[1], found[2]) if found else ("", "nothing")


def main(arguments: Sequence[str]) -> None:
    coordinator, scenario, victim, *banks = arguments
    with txrpc.connect(coordinator, process="client"):
        print("ready", flush=True)
        xid, told = carry_out(scenario, victim, banks, timeout_s=4)
        print(f"told {xid} {told}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
