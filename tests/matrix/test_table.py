"""The generated page says what the code does."""

from tests.matrix.table import PAGE, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == page(), "run: python -m tests.matrix.table"
