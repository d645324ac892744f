"""The OCR rows of the TMPO release that state the mathematics."""

import pytest

from diffalign.rewards.ocr import edit_distance, wanted_text


def test_the_edit_score_agrees_with_the_release(golden):
    compared = 0
    for row in golden["ocr_score"]:
        wanted, read = row["target"], row["detected"]
        if not wanted:  # the release scores what nobody asked for, 0.5 and 1; ours refuses such a prompt before the run
            continue
        assert 1 - edit_distance(wanted, read) / max(len(wanted), len(read)) == pytest.approx(row["score"], rel=1e-6)
        compared += 1
    assert compared == 4


def test_the_wanted_text_is_what_stands_in_quotes(golden):
    tagged, quoted, apostrophes = golden["ocr_target"]
    assert wanted_text(quoted["prompt"]) == quoted["target"]
    assert wanted_text(apostrophes["prompt"]) == ""  # the release takes what lies between two apostrophes for a quotation
    assert "OCR_TARGET" in tagged["prompt"]  # a tag of the release's own; ours has the prompt's metadata for that
