"""``flexgen-helm eval``: a suite of run entries through HELM's own commands, and its scores as a table."""
