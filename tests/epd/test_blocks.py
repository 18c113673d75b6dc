"""The block manager against a model of what it promises."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from epd.kv.blocks import BlockManager, BlockTable, ImageSpan, extend_hashes

BLOCK = 4


def hashes_of(
    tokens: list[int], *, spans: tuple[ImageSpan, ...] = (), salt: str = "", size: int = BLOCK
) -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, tokens, spans=spans, block_size=size, salt=salt)
    return hashes


def fill(manager: BlockManager, tokens: list[int], salt: str = "") -> BlockTable:
    """Open, compute and publish all of `tokens`."""
    hashes = hashes_of(tokens, salt=salt, size=manager.block_size)
    table = manager.open(hashes)
    new = len(tokens) - table.lengths[0]
    assert manager.grow(table, new)
    table.lengths = [length + new for length in table.lengths]
    manager.publish(table, hashes)
    return table


def test_hashes_cover_only_full_blocks_and_extend_in_place():
    tokens = list(range(11))
    whole = hashes_of(tokens)
    assert len(whole) == 2
    grown = hashes_of(tokens[:5])
    extend_hashes(grown, tokens, spans=(), block_size=BLOCK, salt="")
    assert grown == whole


@pytest.mark.parametrize("change", ["first", "salt", "key", "span"])
def test_hash_chain_depends_on_everything_before_it(change: str):
    tokens = [7, 9, 9, 9, 9, 9, 5, 3]
    span = ImageSpan(1, 6, "picture")
    base = hashes_of(tokens, spans=(span,))
    variants = {
        "first": hashes_of([8, *tokens[1:]], spans=(span,)),
        "salt": hashes_of(tokens, spans=(span,), salt="tenant"),
        "key": hashes_of(tokens, spans=(ImageSpan(1, 6, "another"),)),
        "span": hashes_of(tokens),
    }
    assert not set(base) & set(variants[change])


def test_a_block_after_an_image_is_named_by_its_offset():
    """Same placeholders, same block contents, other offset within the image: other name."""
    tokens = [9] * 8
    early = hashes_of(tokens, spans=(ImageSpan(0, 8, "a"),))
    late = hashes_of(tokens, spans=(ImageSpan(2, 8, "a"),))
    assert early[0] != late[0]
    assert early[1] != late[1]


def test_two_images_swapped_give_other_hashes():
    tokens = [9] * 8
    one = hashes_of(tokens, spans=(ImageSpan(0, 4, "a"), ImageSpan(4, 8, "b")))
    two = hashes_of(tokens, spans=(ImageSpan(0, 4, "b"), ImageSpan(4, 8, "a")))
    assert not set(one) & set(two)


def test_keys_cannot_be_confused_across_spans():
    """No two span lists write the same bytes, whatever characters a key has."""
    tokens = [9] * 4
    one = hashes_of(tokens, spans=(ImageSpan(2, 4, "x0;y"),))
    two = hashes_of(tokens, spans=(ImageSpan(0, 2, "x"), ImageSpan(2, 4, "y")))
    assert one != two


def test_prefix_is_shared_and_survives_its_owner():
    manager = BlockManager(8, BLOCK)
    first = fill(manager, list(range(10)))
    second = manager.open(hashes_of(list(range(8))))
    assert second.blocks[0] == first.blocks[0][:2]
    assert second.lengths == [8]
    manager.check([first, second])
    manager.close(first)
    manager.close(second)
    assert manager.num_free == 8
    third = manager.open(hashes_of(list(range(8))))
    assert third.lengths == [8]
    manager.check([third])


def test_prefix_of_another_tenant_is_not_found():
    manager = BlockManager(8, BLOCK)
    fill(manager, list(range(8)), salt="a")
    assert manager.open(hashes_of(list(range(8)), salt="b")).lengths == [0]


def test_prefix_cache_can_be_off():
    manager = BlockManager(8, BLOCK, prefix_cache=False)
    manager.close(fill(manager, list(range(8))))
    assert manager.open(hashes_of(list(range(8)))).lengths == [0]


def test_idle_prefix_blocks_are_reused_oldest_and_deepest_first():
    manager = BlockManager(4, BLOCK)
    old, new = list(range(8)), list(range(100, 108))
    manager.close(fill(manager, old))
    manager.close(fill(manager, new))
    table = manager.open()
    assert manager.grow(table, 1)
    assert manager.match(hashes_of(old)) == 1
    assert manager.match(hashes_of(new)) == 2
    assert manager.grow(table, 2 * BLOCK + 1)
    assert manager.match(hashes_of(old)) == 0
    assert manager.match(hashes_of(new)) == 1


def test_using_a_prefix_makes_it_recent():
    manager = BlockManager(4, BLOCK)
    old, new = list(range(8)), list(range(100, 108))
    manager.close(fill(manager, old))
    manager.close(fill(manager, new))
    manager.close(manager.open(hashes_of(old)))
    table = manager.open()
    assert manager.grow(table, 2 * BLOCK)
    assert manager.match(hashes_of(old)) == 2
    assert manager.match(hashes_of(new)) == 0


def test_growing_is_all_or_nothing():
    manager = BlockManager(3, BLOCK)
    table = manager.open()
    assert not manager.grow(table, 13)
    assert table.blocks == [[]]
    assert manager.num_free == 3
    assert manager.grow(table, 12)
    assert manager.num_free == 0


def test_growing_counts_from_the_length_not_from_the_blocks():
    manager = BlockManager(8, BLOCK)
    table = manager.open()
    assert manager.grow(table, 5)
    assert len(table.blocks[0]) == 2
    table.lengths = [5]
    assert manager.missing(table, 3) == 0
    assert manager.missing(table, 4) == 1


def test_forgotten_content_is_never_shared_again():
    manager = BlockManager(8, BLOCK)
    table = fill(manager, list(range(8)))
    manager.close(table, forget=True)
    manager.check([])
    assert manager.match(hashes_of(list(range(8)))) == 0


def test_forgetting_leaves_another_owner_its_blocks():
    manager = BlockManager(8, BLOCK)
    first = fill(manager, list(range(8)))
    second = manager.open(hashes_of(list(range(8))))
    manager.close(first, forget=True)
    manager.check([second])
    manager.close(second)
    manager.check([])
    assert manager.num_free == 8


def test_layer_groups_hold_different_lengths():
    manager = BlockManager(6, BLOCK, num_groups=2, prefix_cache=False)
    table = manager.open()
    assert manager.grow(table, 8)
    table.lengths = [8, 3]
    assert manager.missing(table, 1) == 1
    assert manager.grow(table, 1)
    assert [len(blocks) for blocks in table.blocks] == [3, 2]
    manager.check([table])
    # a new table starts level, so the fuller group decides
    other = manager.open()
    assert not manager.grow(other, 4 * BLOCK)
    assert manager.grow(other, 3 * BLOCK)
    manager.check([table, other])
    manager.close(table)
    manager.close(other)
    manager.check([])


def test_a_prefix_counts_only_if_every_layer_group_has_it():
    manager = BlockManager(4, BLOCK, num_groups=2)
    manager.close(fill(manager, list(range(8))))
    uneven = manager.open()
    assert manager.grow(uneven, 2 * BLOCK)
    uneven.lengths = [8, 0]
    assert manager.grow(uneven, BLOCK)  # group 0 takes a third block, an idle one
    assert manager.match(hashes_of(list(range(8)))) == 1


def test_freeing_twice_is_noticed():
    manager = BlockManager(2, BLOCK)
    table = manager.open()
    assert manager.grow(table, 1)
    twin = BlockTable([list(table.blocks[0])], [0])
    manager.close(table)
    with pytest.raises(AssertionError, match="freed twice"):
        manager.close(twin)


class BlockMachine(RuleBasedStateMachine):
    """Random lives of sequences over a small alphabet, so that prefixes collide often."""

    @initialize(groups=st.integers(1, 2), blocks=st.integers(2, 12))
    def start(self, groups: int, blocks: int) -> None:
        self.manager = BlockManager(blocks, 2, num_groups=groups)
        self.live: list[tuple[BlockTable, list[int]]] = []
        self.content: dict[tuple[int, int], tuple[int, ...]] = {}

    def written(self, table: BlockTable, tokens: list[int]) -> None:
        """Write what the forward pass would: the whole prefix names a block's content."""
        for group, blocks in enumerate(table.blocks):
            for index, block in enumerate(blocks):
                stop = min((index + 1) * 2, len(tokens))
                self.content[group, block] = tuple(tokens[:stop])

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def arrive(self, tokens: list[int]) -> None:
        hashes = hashes_of(tokens, size=2)
        table = self.manager.open(hashes[: (len(tokens) - 1) // 2])
        cached = table.lengths[0]
        assert cached < len(tokens)
        for group, blocks in enumerate(table.blocks):
            for index, block in enumerate(blocks):  # shared blocks really hold this prefix
                assert self.content[group, block] == tuple(tokens[: (index + 1) * 2])
        if not self.manager.grow(table, len(tokens) - cached):
            self.manager.close(table)
            return
        table.lengths = [len(tokens)] * len(table.lengths)
        self.written(table, tokens)
        self.manager.publish(table, hashes)
        self.live.append((table, tokens))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def decode(self, data: st.DataObject, token: int) -> None:
        table, tokens = data.draw(st.sampled_from(self.live))
        if self.manager.grow(table, 1):
            tokens.append(token)
            table.lengths = [length + 1 for length in table.lengths]
            for group, blocks in enumerate(table.blocks):
                self.content[group, blocks[-1]] = tuple(tokens)
            self.manager.publish(table, hashes_of(tokens, size=2))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), forget=st.booleans())
    def leave(self, data: st.DataObject, forget: bool) -> None:
        index = data.draw(st.integers(0, len(self.live) - 1))
        table, _ = self.live.pop(index)
        self.manager.close(table, forget=forget)

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check(table for table, _ in self.live)
        for group in range(self.manager.num_groups):
            last = [t.blocks[group][-1] for t, tokens in self.live if len(tokens) % 2]
            assert len(set(last)) == len(last), "a block that is written to is shared"

    def teardown(self) -> None:
        for table, _ in getattr(self, "live", []):
            self.manager.close(table)
        if hasattr(self, "manager"):
            assert self.manager.num_free == self.manager.num_blocks
            self.manager.check([])


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@settings(max_examples=100, deadline=None)
@given(
    a=st.lists(st.integers(0, 2), max_size=20),
    b=st.lists(st.integers(0, 2), max_size=20),
)
def test_equal_hashes_mean_equal_prefixes(a: list[int], b: list[int]):
    same = sum(x == y for x, y in zip(hashes_of(a), hashes_of(b), strict=False))
    common = 0
    while common < min(len(a), len(b)) and a[common] == b[common]:
        common += 1
    assert same == common // BLOCK
