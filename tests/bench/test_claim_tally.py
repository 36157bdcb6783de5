import json

import pytest

from pnc.bench.claim_tally import markdown, read_claims
from pnc.foundation.errors import FileFormatError, InputError


def result(*holds):
    claims = [{"claim": f"claim {n}", "must": ">= 1", "value": 0.5, "holds": one} for n, one in enumerate(holds)]
    return json.dumps({"rows": [], "claims": claims})


def test_claims_that_do_not_hold_are_counted_and_listed(tmp_path):
    (tmp_path / "b.json").write_text(result(True, False, False))
    (tmp_path / "a.json").write_text(result(True))
    (tmp_path / "plain.json").write_text(json.dumps({"rows": []}))
    tallies = read_claims(tmp_path)
    assert [(one.name, one.n_claims, len(one.failing)) for one in tallies] == [("a", 1, 0), ("b", 3, 2)]
    text = markdown(tallies)
    assert text.startswith("Of 4 claims 2 do not hold.")
    assert "claim 1" in text and "claim 0" not in text


def test_other_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no result file in .* has claims"):
        read_claims(tmp_path)
    (tmp_path / "odd.json").write_text("[1, 2]")
    with pytest.raises(FileFormatError, match=r"odd\.json is not a result file of a bench"):
        read_claims(tmp_path)
