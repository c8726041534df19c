from hf_esm.utils import markdown_table, plain_table


ROWS = [["method", "α", "average"], ["esm | vit", "1.2", "96.1"], ["tsv-m", "", ""]]


def test_a_markdown_table_has_a_line_of_alignments_and_no_bar_of_a_cell_ends_it():
    assert markdown_table(ROWS) == [
        "| method | α | average |",
        "| --- | --: | --: |",
        r"| esm \| vit | 1.2 | 96.1 |",
        "| tsv-m |  |  |",
    ]


def test_a_plain_table_is_aligned_without_trailing_spaces():
    assert plain_table(ROWS) == [
        "method       α  average",
        "esm | vit  1.2     96.1",
        "tsv-m",
    ]
