"""Python imports this at its start where PYTHONPATH names this folder: also in the processes that a test starts."""

from tests.mutants.outside import MUTANTS
from tests.mutation import install

install({name: change for name, (change, _) in MUTANTS.items()})
