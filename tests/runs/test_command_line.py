from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexgen_helm.errors import FlexGenError
from flexgen_helm.runs.command_line import add_json, add_model, make_parser, reports_errors, write_json
from flexgen_helm.runs.memory_limit.cgroup import NotPermitted


@pytest.mark.parametrize(("error", "status"), [(None, 0), (FlexGenError("No room."), 1), (NotPermitted("Run as root."), 3)])
def test_errors_of_users_are_lines_and_statuses(
    error: FlexGenError | None, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    @reports_errors
    def main() -> int:
        if error is not None:
            raise error
        return 0

    assert main() == status
    assert capsys.readouterr().err == ("" if error is None else f"{error}\n")


def test_errors_in_code_keep_their_traceback() -> None:
    @reports_errors
    def main() -> int:
        raise KeyError("a mistake")

    with pytest.raises(KeyError):
        main()


def test_a_result_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    parser = make_parser("some", "Summary.\n\nMore.")
    add_json(parser)
    add_model(parser)
    options = parser.parse_args([])
    write_json(options.json, {"a": 1})
    assert (options.model, list(tmp_path.iterdir())) == (None, [])
    write_json(parser.parse_args(["--json", str(tmp_path / "result.json")]).json, {"a": 1})
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": 1}
