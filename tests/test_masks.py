import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_fast import masks
from dalle_fast.layout import SequenceLayout
from dalle_fast.masks import Mask, Pattern

RULES = [
    "full",
    "row(window=raster)",
    "row(window=in_row)",
    "column",
    "conv(kernel=3,boundary=flat)",
    "conv(kernel=3,boundary=clip)",
    "conv(kernel=3,boundary=torus)",
    "conv(kernel=3,boundary=quadrant,dilation=2)",
]
# The same rules written a second time, cell by cell, as DESIGN's table states them (kernel 3, so radius 1).
BY_HAND = {
    RULES[0]: lambda q, k, h, w: True,
    RULES[1]: lambda q, k, h, w: q - k <= w,
    RULES[2]: lambda q, k, h, w: q // w == k // w,
    RULES[3]: lambda q, k, h, w: q % w == k % w,
    RULES[4]: lambda q, k, h, w: q - k in {w * dr + dc for dr in (0, 1) for dc in (-1, 0, 1)},
    RULES[5]: lambda q, k, h, w: q // w - k // w <= 1 and abs(q % w - k % w) <= 1,
    RULES[6]: lambda q, k, h, w: (
        any((q // w + dr) % h == k // w for dr in (-1, 0, 1)) and any((q % w + dc) % w == k % w for dc in (-1, 0, 1))
    ),
    RULES[7]: lambda q, k, h, w: q // w - k // w in (0, 2, 4) and q % w - k % w in (0, 2, 4),
}
patterns = st.sampled_from([*RULES, "conv(kernel=5,boundary=flat)", "conv(kernel=7,boundary=torus)"])
layouts = st.builds(SequenceLayout, st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (7, 2), (1, 6), (6, 1), (1, 1)])
def test_each_rule_is_what_the_table_says(rule, size):
    h, w = size
    mask = Mask(Pattern.parse(rule), SequenceLayout(3, h, w))
    expected = [[k <= q and BY_HAND[rule](q, k, h, w) for k in range(h * w)] for q in range(h * w)]
    np.testing.assert_array_equal(mask.image(), expected)


def test_the_three_readings_of_the_convolution_differ_as_counted():
    flat, clip, torus = (
        Mask.parse(f"conv(kernel=11,boundary={b})@256+32x32").image() for b in ("flat", "clip", "torus")
    )
    assert [(flat ^ clip).sum(), (flat ^ torus).sum(), (clip ^ torus).sum()] == [4815, 6075, 10110]


@pytest.mark.parametrize(
    ("pattern", "keys", "reach"),
    [
        ("row", 33, 32),
        ("row(window=in_row)", 32, 31),
        ("column", 32, 992),
        ("conv(kernel=11,boundary=flat)", 61, 165),
        ("conv(kernel=11,boundary=clip)", 61, 165),
        ("conv(kernel=11,boundary=torus)", 121, 1023),
        ("conv(kernel=5,boundary=quadrant)", 25, 132),
        ("full", 1024, 1023),
    ],
)
def test_neighbours_and_reach_at_the_papers_layout(pattern, keys, reach):
    mask = Mask.parse(f"{pattern}@256+32x32")
    table, counts = mask.neighbours()
    assert (table.shape[1], counts.max(), mask.reach) == (keys, keys, reach)
    assert table.dtype == np.int16


def test_what_every_step_asks_of_a_mask_is_found_once(monkeypatch):
    mask = Mask.parse("conv(kernel=5,boundary=clip)@7+9x9")
    slots = mask.ring()
    monkeypatch.setattr(masks, "_neighbours", lambda mask: pytest.fail("the neighbours were looked through again"))
    assert (mask.ring(), mask.ring(2)) == (slots, slots + 1)


@pytest.mark.parametrize(
    ("pattern", "tiles"), [("full", 210), ("row", 105), ("column", 90), ("conv(kernel=11,boundary=flat)", 132)]
)
def test_tile_counts_at_the_papers_layout(pattern, tiles):
    assert Mask.parse(f"{pattern}@256+32x32").block_plan(64, 64).tiles(256) == tiles


@given(patterns, layouts)
@settings(max_examples=60, deadline=None)
def test_every_derived_form_says_the_same(pattern, layout):
    mask = Mask(Pattern.parse(pattern), layout)
    image = mask.image()
    assert not np.triu(image, 1).any()
    assert image.diagonal().all()
    dense = mask.dense()
    np.testing.assert_array_equal(dense[layout.text_len :, layout.text_len :], image)
    assert dense[layout.text_len :, : layout.text_len].all()
    np.testing.assert_array_equal(dense[: layout.text_len], np.tri(layout.text_len, layout.total, dtype=bool))
    table, counts = mask.neighbours()
    for cell in range(layout.cells):
        np.testing.assert_array_equal(table[cell, : counts[cell]], np.flatnonzero(image[cell]))
        assert (table[cell, counts[cell] :] == cell).all()
    assert mask.reach == max(c - np.flatnonzero(image[c])[0] for c in range(layout.cells))
    assert Mask.parse(str(mask)) == mask


@given(patterns, layouts, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_a_tail_still_holds_what_a_chunk_of_cells_reads(pattern, layout, chunk):
    mask = Mask(Pattern.parse(pattern), layout)
    chunk = min(chunk, layout.cells)
    slots = mask.tail_slots(chunk)
    tables = mask.decode_tables(slots)
    holds = np.full(slots, -1)
    for first in range(0, layout.cells - chunk + 1, chunk):
        cells = np.arange(first, first + chunk)
        holds[tables.slot_of_cell[cells]] = cells
        for cell in cells:
            read = holds[tables.slots[cell, : tables.counts[cell]]]
            np.testing.assert_array_equal(read, np.flatnonzero(mask.image()[cell]))
            assert (tables.slots[cell, tables.counts[cell] :] == tables.slot_of_cell[cell]).all()


@given(patterns, layouts, st.sampled_from([(16, 16), (32, 16), (16, 64), (5, 7)]))
@settings(max_examples=60, deadline=None)
def test_a_block_plan_holds_the_mask_bit_by_bit(pattern, layout, blocks):
    mask = Mask(Pattern.parse(pattern), layout)
    plan = mask.block_plan(*blocks)
    bq, bk = blocks
    count_q, count_k = len(plan.offsets) - 1, len(plan.key_offsets) - 1
    rebuilt = np.zeros((count_q * bq, count_k * bk), dtype=bool)
    for b in range(count_q):
        for entry in range(plan.offsets[b], plan.offsets[b + 1]):
            words = (
                plan.bits[plan.mask_ids[entry]]
                if plan.mask_ids[entry] >= 0
                else np.full((bq, -(-bk // 32)), -1, np.int32)
            )
            bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")[:, :bk].astype(
                bool
            )
            k = plan.blocks[entry]
            rebuilt[b * bq : (b + 1) * bq, k * bk : (k + 1) * bk] = bits
            assert bits.any()
            assert (plan.mask_ids[entry] < 0) == bits.all()
    cells = layout.cells
    assert not rebuilt[cells:].any()
    assert not rebuilt[:, cells:].any()
    np.testing.assert_array_equal(rebuilt[:cells, :cells], mask.image()[np.ix_(plan.order, plan.order)])
    assert sorted(plan.order) == list(range(cells))
    by_key = {(int(q), k, int(e)) for k in range(count_k) for q, e in _entries(plan, k)}
    by_query = {
        (q, int(plan.blocks[e]), e) for q in range(count_q) for e in range(plan.offsets[q], plan.offsets[q + 1])
    }
    assert by_key == by_query


def _entries(plan, key_block):
    own = slice(plan.key_offsets[key_block], plan.key_offsets[key_block + 1])
    return zip(plan.key_blocks[own], plan.key_entries[own], strict=True)


def test_columns_are_read_from_contiguous_slots_and_planned_column_major():
    mask = Mask.parse("column@256+32x32")
    tables = mask.decode_tables(mask.tail_slots())
    for cell in (0, 31, 500, 1023):
        read = tables.slots[cell, : tables.counts[cell]]
        assert (np.diff(read) == 1).all()
    assert list(mask.block_plan(64, 64).order[:3]) == [0, 32, 64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "diagonal"}, "got pattern kind 'diagonal', expected one of full, row, column, conv"),
        ({"kind": "row", "window": "wide"}, "got window='wide'"),
        ({"kind": "conv", "boundary": "mirror"}, "got boundary='mirror'"),
        ({"kind": "conv", "kernel": 4}, "got kernel=4, expected an odd number"),
        ({"kind": "conv", "dilation": 2}, "got dilation=2 with boundary='flat'"),
        ({"kind": "conv", "boundary": "quadrant", "dilation": 0}, "got dilation=0"),
        ({"kind": "row", "kernel": 3}, "got kernel=3, which pattern kind 'row' does not have"),
    ],
)
def test_impossible_patterns_are_named(options, message):
    with pytest.raises(ValueError) as error:
        Pattern(**options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("text", ["", "row(", "row(wide)", "conv(kernel=x)", "conv(size=3)", "row(window=raster"])
def test_a_bad_pattern_name_is_refused(text):
    with pytest.raises(ValueError, match="got pattern"):
        Pattern.parse(text)


def test_too_small_a_tail_is_refused():
    with pytest.raises(ValueError, match=r"got a tail of 32 slots for row.*, expected 33 to 1024"):
        Mask.parse("row@256+32x32").decode_tables(32)
    with pytest.raises(ValueError, match="got chunk=0"):
        Mask.parse("row@256+32x32").ring(0)
    with pytest.raises(ValueError, match="got blocks of 0x32"):
        Mask.parse("row@256+32x32").block_plan(0, 32)
