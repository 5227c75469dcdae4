"""How a tile of few tokens leaves the registers: shares of it go round the cluster, it turns eight by eight, rows are stored.

Knows the fragment of a wgmma whose rows are outputs and whose columns are tokens: of a 64 x COLUMNS tile a thread holds, for
every 8 tokens j, elements 4j..4j+3: two neighbouring tokens of output lane / 4 of its warp's 16, then the same two of the
output 8 below. Everything is known at compile time but the sizes of y: a loop or a division too many is time in which no
memory works.
"""

from ._linear_wgmma_store_gpu import gate_pair, round_pair
from ._prelude import *
from layout.tma_async import SharedMemBarrier
from max.gpu.sync import named_barrier
from std.sys import inlined_assembly

comptime _Shared = MutPointer[Scalar[BF16], _, address_space=AddressSpace.SHARED]
comptime SKEW = 8
"""Outputs of padding behind a token's: tokens at a time are written and read without bank conflicts."""


@always_inline
def cluster_arrive():
    """Says to the cluster that this warp has come so far, and orders no memory."""
    inlined_assembly["barrier.cluster.arrive.relaxed.aligned;", NoneType, constraints="", has_side_effect=True]()


@always_inline
def cluster_wait():
    """Waits until all warps of the cluster have arrived."""
    inlined_assembly["barrier.cluster.wait.aligned;", NoneType, constraints="~{memory}", has_side_effect=True]()


@always_inline
def held_octets[COLUMNS: Int, SPLIT: Int]() -> Int:
    """Eights of tokens whose sums a block of the cluster finishes."""
    return max(COLUMNS // 8 // SPLIT, 1)


@always_inline
def inbox_bytes[COLUMNS: Int, SPLIT: Int, THREADS: Int]() -> Int:
    """Bytes that a block gets from the cluster: 16 from each thread for each eight tokens of its share."""
    return SPLIT * held_octets[COLUMNS, SPLIT]() * THREADS * 16


@always_inline
def send_shares[
    COLUMNS: Int, SPLIT: Int, THREADS: Int
](
    inbox: _Shared,
    arrived: MutPointer[SharedMemBarrier, _, address_space=AddressSpace.SHARED],
    acc: SIMD[F32, COLUMNS // 2],
    rank: UInt32,
):
    """Sends each block of the cluster its share of a fragment; the bytes count at its barrier `arrived`."""
    comptime EACH = held_octets[COLUMNS, SPLIT]()
    var slot = UInt32(Int(inbox)) + (rank * UInt32(EACH * THREADS) + UInt32(thread_idx.x)) * 16
    comptime for j in range(COLUMNS // 8):
        inlined_assembly[
            (
                "{ .reg .b32 ra, rb; mapa.shared::cluster.u32 ra, $0, $2; mapa.shared::cluster.u32 rb, $1, $2;"
                " st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [ra], {$3, $4, $5, $6}, [rb]; }"
            ),
            NoneType,
            constraints="r,r,r,f,f,f,f",
            has_side_effect=True,
        ](
            slot + UInt32(j % EACH * THREADS * 16),
            UInt32(Int(arrived)),
            UInt32(j // EACH),
            acc[4 * j],
            acc[4 * j + 1],
            acc[4 * j + 2],
            acc[4 * j + 3],
        )


@always_inline
def sum_shares[
    COLUMNS: Int, SPLIT: Int, THREADS: Int
](inbox: _Shared) -> SIMD[F32, 4 * held_octets[COLUMNS, SPLIT]()]:
    """Adds what the blocks of the cluster sent, in rank order."""
    comptime EACH = held_octets[COLUMNS, SPLIT]()
    var sums = SIMD[F32, 4 * EACH](0)
    var from_ = inbox.unsafe_bitcast[Float32]()
    comptime for g in range(EACH):
        var sum = from_.unsafe_load[width=4, alignment=16]((g * THREADS + thread_idx.x) * 4)
        comptime for r in range(1, SPLIT):
            sum += from_.unsafe_load[width=4, alignment=16](((r * EACH + g) * THREADS + thread_idx.x) * 4)
        comptime for e in range(4):
            sums[4 * g + e] = sum[e]
    return sums


@always_inline
def _turn[count: SIMDLength, //](to: UInt32, words: SIMD[DType.uint32, count]):
    """Writes two or four 8 x 8 matrices transposed; eight lanes each name the places of a matrix's rows."""
    comptime if count == 4:
        inlined_assembly[
            "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};",
            NoneType,
            constraints="r,r,r,r,r,~{memory}",
            has_side_effect=True,
        ](to, words[0], words[1], words[2], words[3])
    else:
        inlined_assembly[
            "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [$0], {$1, $2};",
            NoneType,
            constraints="r,r,r,~{memory}",
            has_side_effect=True,
        ](to, words[0], words[1])


@always_inline
def store_tile[
    width: SIMDLength, //, has_bias: Bool, GATED: Bool, ROWS: Int
](
    y: Ptr[BF16],
    bias: Ptr[BF16],
    sums: SIMD[F32, width],
    tile: _Shared,
    warp: Int,
    first_token: Int32,
    output_base: Int32,
    m: Int32,
    n: Int32,
):
    """Rounds a fragment of ROWS rows of w, which may be gates and as many up projections, and stores it row by row of y."""
    comptime OCTETS = Int(width) // 4  # eights of tokens
    comptime THREADS = 2 * ROWS
    comptime OUTPUTS = ROWS // 2 if GATED else ROWS
    comptime PITCH = ROWS + SKEW
    var words = SIMD[DType.uint32, 2 * OCTETS](0)
    var added = SIMD[F32, 2](0)
    comptime if has_bias:
        comptime for h in range(2):
            var output = output_base + Int32(warp * 16 + lane_id() // 4 + 8 * h)
            added[h] = bias[unsafe_offset=Int(min(output, n - 1))].cast[F32]()
    comptime for i in range(2 * OCTETS):
        comptime if has_bias:
            words[i] = round_pair(sums[2 * i] + added[i % 2], sums[2 * i + 1] + added[i % 2])
        else:
            words[i] = round_pair(sums[2 * i], sums[2 * i + 1])
    # Lanes 0 to 7 name the places of 8 tokens, 8 to 15 those of the outputs beside, the others those of the next 8 tokens.
    var place = (lane_id() // 16 * 8 + lane_id() % 8) * PITCH + warp * 16 + lane_id() // 8 % 2 * 8
    var to = UInt32(Int(tile)) + UInt32(place * 2)
    comptime for g in range(0, OCTETS - 1, 2):
        _turn(to + UInt32(g * 8 * PITCH * 2), words.slice[4, offset=2 * g]())
    comptime if OCTETS % 2 == 1:
        _turn(to + UInt32((OCTETS - 1) * 8 * PITCH * 2), words.slice[2, offset=2 * OCTETS - 2]())
    named_barrier[Int32(THREADS)](1)

    comptime PARTS = OUTPUTS // 8  # of 16 bytes, of a token's outputs
    comptime STEP = THREADS // PARTS
    comptime TIMES = ceildiv(OCTETS * 8, STEP)
    var output = Int32(thread_idx.x % PARTS * 8)
    var token = Int32(thread_idx.x // PARTS)
    var from_ = tile.unsafe_bitcast[UInt32]().unsafe_offset((Int(token) * PITCH + Int(output)) // 2)
    var row = y.unsafe_offset(Int(first_token + token) * Int(n) + Int(output_base + output)).unsafe_bitcast[UInt32]()
    var tokens = min(Int32(OCTETS * 8), m - first_token) if output_base + output < n else 0
    # All in flight before the first is stored.
    var parts = Array[SIMD[DType.uint32, 4], TIMES](fill=0)
    comptime for u in range(TIMES):
        if token + Int32(u * STEP) < tokens:
            parts[u] = from_.unsafe_load[width=4, alignment=16](u * STEP * PITCH // 2)
            comptime if GATED:
                var ups = from_.unsafe_load[width=4, alignment=16]((u * STEP * PITCH + OUTPUTS) // 2)
                comptime for e in range(4):
                    parts[u][e] = gate_pair(parts[u][e], ups[e])
    comptime for u in range(TIMES):
        if token + Int32(u * STEP) < tokens:
            row.unsafe_store[alignment=16](Int(n) * (u * STEP) // 2, parts[u])
