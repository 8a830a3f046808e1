"""README and docs/backends.md say what the kernels' tables say."""

from pathlib import Path

import pytest

from onepass.core import support_table

_ROOT = Path(__file__).parents[2]


def test_documentation_is_fresh() -> None:
    stale = support_table.stale(_ROOT)
    assert not stale, f"run python -m onepass.core.support_table: {stale}"


def test_tables_tell_reasons() -> None:
    page = support_table.backends_page()
    assert "| softcap | yes | yes | yes |" in page
    assert "| head_dim above 256 | head_dim 512 is above 256" in page
    assert "| key_mask |  | cpu, triton | cpu, triton |" in support_table.readme_section()


def test_stale_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# x\n<!-- support:begin -->\nold\n<!-- support:end -->\nend\n")
    assert len(support_table.stale(tmp_path)) == 2
    with pytest.raises(ValueError, match="no section between"):
        support_table.with_section("# x\n")
    fresh = support_table.with_section("# x\n<!-- support:begin -->\nold\n<!-- support:end -->\nend\n")
    assert fresh.startswith("# x\n")
    assert fresh.endswith("<!-- support:end -->\nend\n")
    assert "old" not in fresh
    assert support_table.with_section(fresh) == fresh
