from digits import pair
from pnc.bench import few_images
from pnc.bench.result_files import Cells
from pnc.bench.setting import Setting
from pnc.data.readers import load_data


def test_rows_are_made_once_and_claims_compare_means(tmp_path, monkeypatch):
    monkeypatch.setattr(few_images, "N_IMAGES", (1, 3))
    nets = pair()
    train, test = load_data("digits", "train"), load_data("digits", "test")
    setting = Setting(nets.source, nets.target, train, test, "digits", 1, 1, flip=False)
    bench = few_images.bench({"digits": setting}, range(2), {})
    rows = bench.measure(Cells(tmp_path / "few.jsonl", {}, few_images.KEYS), None)
    assert [(row["n_images"], row["seed"]) for row in rows] == [(1, 0), (3, 0), (1, 1), (3, 1)]
    assert all(row["held_out"] == (row["n_images"] > 1) for row in rows)
    assert all(row["source_cut"] == "input" for row in rows if row["n_images"] == 1)

    def fail(*_):
        raise AssertionError("a row was made again")

    monkeypatch.setattr(few_images, "_row", fail)
    assert bench.measure(Cells(tmp_path / "few.jsonl", {}, few_images.KEYS), None) == rows
    found = few_images.claims(rows)
    assert len(found) == 2 * 2
    mean = few_images.means(rows, "digits", 1)
    assert found[0].value == mean["clone"] - mean["direct ensemble"]
    assert found[0].holds == (found[0].value >= -0.01)
    text = few_images.markdown(rows)
    assert text.count("| digits |") == 2 + 4 and "2 supports each" in text
