"""Which tile a block of the wgmma kernel computes: the order in which all blocks walk over a product of many tiles."""

from ._prelude import *

comptime TILE_GROUP = 8  # A tiles walked side by side, so that concurrent blocks share both operands in L2


@always_inline
def tile_origin[
    SHARE: Int, A_STEP: Int, B_STEP: Int
](tile: Int, a_tiles: Int, b_tiles: Int, rank: Int) -> Tuple[Int, Int]:
    """First row of A and of B of the tile: groups of TILE_GROUP A tiles, A fastest inside a group.

    With SHARE blocks in a cluster, `a_tiles` counts their neighbouring tiles of A as one. In 32 bits, as a division of 64
    is a call on a GPU, for which the consumers' store would wait.
    """
    var per_group = UInt32(TILE_GROUP * b_tiles)
    var part = UInt32(tile) // per_group
    var base = part * UInt32(TILE_GROUP)
    var width = min(UInt32(TILE_GROUP), UInt32(a_tiles) - base)
    var inside = UInt32(tile) - part * per_group
    var b = inside // width
    var a = Int(base + inside - b * width)
    return (a * SHARE + (rank if SHARE > 1 else 0)) * A_STEP, Int(b) * B_STEP
