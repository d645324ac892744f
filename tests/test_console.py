from ring import ring_loop

from diffalign.console import Console
from diffalign.evaluation import HeldOutEvaluation


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    (tmp_path / "held-out.txt").write_text("one\ntwo\n")
    hooks = [HeldOutEvaluation(str(tmp_path / "held-out.txt"), samples=3, steps=4), Console(lines=2)]
    ring_loop(tmp_path / "run", hooks).run(4)
    out = " ".join(capsys.readouterr().out.split())
    assert "SoftmaxTB: steps 0 to 4, 2 prompts a step" in out
    assert "step 2/4 reward" in out
    assert "step 3/4" not in out
    for word in ("diversity", "ratio check", "rows/s", "left"):
        assert word in out
    before, after = (result.rewards["rewarded"].mean().item() for result in hooks[0].results)
    assert f"rewarded {before:.3f} -> {after:.3f}" in out
    assert "diversity (L-GMD)" in out
