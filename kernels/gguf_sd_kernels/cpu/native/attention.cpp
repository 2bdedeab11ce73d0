// Scaled dot-product attention of bfloat16 in AMX's tiles.
//
// Scores are computed transposed, S^T = K Q^T: a row is a key and a column a query, so that all that softmax does is done
// to whole vectors of 16 queries. Rows 2i and 2i + 1 of its exponentials, interleaved, are what a product O^T = V^T P^T
// takes. Scores and weights never leave the first level of the cache.
//
// A query's exponentials are taken relative to its largest score among the first 32 keys. In float32 and bfloat16, which
// have 8 bits of exponent, what comes behind may be 2^20 times as large; only beyond that the reference moves.

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512DQ__) && defined(__AVX512BW__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "tiles.h"
#include "vectors.h"

namespace {

constexpr int64_t PAIR = 2 * TILE;    // its columns of 16 bits: what one instruction sums over
constexpr int64_t SIZE = TILE * PAIR; // 16-bit values in a tile
constexpr int64_t GROUP = PAIR;       // keys at a time
constexpr int64_t GROUPS = 4;         // of keys, whose weights are kept until they meet the values
constexpr int64_t QUERIES = 2 * TILE; // at a time
constexpr int64_t MAX_DIM = 256;
constexpr float LOWEST = -1e38f;
constexpr float LARGEST = 1 << 20; // sum of the weights of 32 keys, beyond which the reference moves

struct Shape {
    int64_t batch, heads, queries, keys, dim;

    int64_t steps() const { return parts(dim, PAIR); }  // of a product over a head's values
    int64_t tiles() const { return parts(dim, TILE); }  // of a head's values
    int64_t groups() const { return parts(keys, GROUP); }
    int64_t packed_keys() const { return groups() * 2 * steps() * SIZE; }
    int64_t packed_values() const { return groups() * tiles() * SIZE; }
    int64_t packed_head() const { return packed_keys() + packed_values(); }
};

struct Strides { // in values; those of a head are side by side
    int64_t batch, head, row;
};

__mmask32 first_of_32(int64_t n) { return n >= 32 ? ~0u : (1u << std::max<int64_t>(n, 0)) - 1; }

// Rows of 16 values of 32 bits become columns.
void transpose(__m512i rows[TILE]) {
    __m512i half[TILE];
    for (int i = 0; i < TILE; i += 2) {
        half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < TILE; i += 4)
        for (int j = 0; j < 2; j++) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(half[i + j], half[i + 2 + j]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(half[i + j], half[i + 2 + j]);
        }
    for (int i = 0; i < TILE; i += 8)
        for (int j = 0; j < 4; j++) {
            half[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + 4 + j], 0x88);
            half[i + 4 + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        rows[j] = _mm512_shuffle_i32x4(half[j], half[8 + j], 0x88);
        rows[8 + j] = _mm512_shuffle_i32x4(half[j], half[8 + j], 0xdd);
    }
}

// Tiles of 16 keys and 32 of their values, all of a key's before the next keys'.
void pack_keys(const bf16* k, int64_t stride, const Shape& shape, bf16* out) {
    for (int64_t first = 0; first < shape.groups() * GROUP; first += TILE)
        for (int64_t start = 0; start < shape.dim; start += PAIR)
            for (int64_t key = first; key < first + TILE; key++, out += PAIR) {
                const __mmask32 there = key < shape.keys ? first_of_32(shape.dim - start) : 0;
                _mm512_storeu_si512(out, _mm512_maskz_loadu_epi16(there, k + key * stride + start));
            }
}

// Pairs of values by queries, tiles of 32 values of 16 queries; two tiles, of 32 queries, before the next values.
void pack_queries(const bf16* q, int64_t stride, int64_t queries, int64_t dim, bf16* out) {
    for (int64_t start = 0; start < dim; start += PAIR)
        for (int64_t first = 0; first < QUERIES; first += TILE, out += SIZE) {
            __m512i rows[TILE];
            for (int64_t i = 0; i < TILE; i++) {
                const __mmask32 there = first + i < queries ? first_of_32(dim - start) : 0;
                rows[i] = _mm512_maskz_loadu_epi16(there, q + (first + i) * stride + start);
            }
            transpose(rows);
            for (int64_t i = 0; i < TILE; i++) _mm512_store_si512(out + i * PAIR, rows[i]);
        }
}

const __m512i INTERLEAVED = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                             5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);

// Values by keys, tiles of 16 values of 32 keys, all values before the next keys.
void pack_values(const bf16* v, int64_t stride, const Shape& shape, bf16* out) {
    for (int64_t first = 0; first < shape.groups() * GROUP; first += GROUP)
        for (int64_t start = 0; start < shape.dim; start += TILE, out += SIZE) {
            const __mmask16 wide = first_of_32(std::min(shape.dim - start, TILE));
            __m512i rows[TILE]; // pairs of keys by values
            for (int64_t i = 0; i < TILE; i++) {
                const int64_t key = first + 2 * i;
                const __m256i even = _mm256_maskz_loadu_epi16(key < shape.keys ? wide : 0, v + key * stride + start);
                const __m256i odd = _mm256_maskz_loadu_epi16(key + 1 < shape.keys ? wide : 0, v + (key + 1) * stride + start);
                rows[i] = _mm512_permutexvar_epi16(INTERLEAVED, _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1));
            }
            transpose(rows);
            for (int64_t i = 0; i < TILE; i++) _mm512_storeu_si512(out + i * PAIR, rows[i]);
        }
}

// float32 [16 keys][16 queries] of each of two tiles of queries: the products of packed keys and queries.
inline void score(const bf16* k, const bf16* q, int64_t steps, float* scores) {
    before_tiles();
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t s = 0; s < steps; s++, q += 2 * SIZE) {
        _tile_loadd(2, k + s * SIZE, 64);
        _tile_loadd(3, q, 64);
        _tile_dpbf16ps(0, 2, 3);
        _tile_loadd(3, q + SIZE, 64);
        _tile_dpbf16ps(1, 2, 3);
    }
    _tile_stored(0, scores, 64);
    _tile_stored(1, scores + GROUP * TILE, 64);
}

__m512 highest(const float* scores, int64_t keys) {
    __m512 top = _mm512_load_ps(scores);
    for (int64_t key = 1; key < keys; key++) top = _mm512_max_ps(top, _mm512_load_ps(scores + key * TILE));
    return top;
}

// Weights 2^(scale * scores - reference) of up to 32 keys, 16 queries each, in pairs of keys; returns their sums.
template <bool ALL>
inline __m512 weigh(const float* scores, int64_t keys, __m512 scale, __m512 reference, bf16* weights) {
    const auto of = [&](int64_t key) {
        if (!ALL && key >= keys) return _mm512_setzero_ps();
        return exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + key * TILE), scale, reference));
    };
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int64_t key = 0; key < GROUP; key += 2) {
        const __m512 even = of(key), odd = of(key + 1);
        const __m512i both = _mm512_permutexvar_epi16(INTERLEAVED, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
        sum = _mm512_dpbf16_ps(sum, (__m512bh)both, ones); // of what is rounded, as the products will see it
        _mm512_store_si512(weights + key * TILE, both);
    }
    return sum;
}

void rescale_weights(bf16* weights, __m512 by) {
    for (int64_t i = 0; i < TILE; i++) {
        const __m512i both = _mm512_load_si512(weights + i * PAIR);
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
        const __m512bh scaled = _mm512_cvtne2ps_pbh(_mm512_mul_ps(odd, by), _mm512_mul_ps(even, by));
        _mm512_store_si512(weights + i * PAIR, _mm512_permutexvar_epi16(INTERLEAVED, (__m512i)scaled));
    }
}

// sums += values^T weights^T for 16 of a head's values, over groups of keys.
inline void add_values(const bf16* values, int64_t tiles, const bf16* weights, int64_t groups, float* sums) {
    before_tiles();
    _tile_loadd(4, sums, 4 * QUERIES);
    _tile_loadd(5, sums + TILE, 4 * QUERIES);
    for (int64_t g = 0; g < groups; g++, values += tiles * SIZE, weights += 2 * SIZE) {
        _tile_loadd(6, values, 64);
        _tile_loadd(7, weights, 64);
        _tile_dpbf16ps(4, 6, 7);
        _tile_loadd(7, weights + SIZE, 64);
        _tile_dpbf16ps(5, 6, 7);
    }
    _tile_stored(4, sums, 4 * QUERIES);
    _tile_stored(5, sums + TILE, 4 * QUERIES);
}

struct alignas(64) Scratch {
    bf16 queries[parts(MAX_DIM, PAIR) * 2 * SIZE];
    float scores[2][2][GROUP * TILE];        // [group, by turns][query tile][key][query]
    bf16 weights[2][GROUPS][2][SIZE];        // [block of groups, by turns][group][query tile][pair of keys][query][2]
    float sums[MAX_DIM * QUERIES];           // [value][query]
};

// Up to 32 queries of a head.
void attend(const bf16* q, int64_t stride, int64_t queries, const bf16* k, const bf16* v, const Shape& shape, float factor,
            bf16* out, int64_t out_stride) {
    static thread_local Scratch own;
    const int64_t steps = shape.steps(), tiles = shape.tiles(), groups = shape.groups();
    const __m512 scale = _mm512_set1_ps(factor);
    __m512 reference[2], sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};

    pack_queries(q, stride, queries, shape.dim, own.queries);
    std::memset(own.sums, 0, tiles * TILE * QUERIES * sizeof(float));
    for (int i = 0; i < 2; i++) score(k + i * steps * SIZE, own.queries, steps, own.scores[0][0] + i * TILE * TILE);
    for (int i = 0; i < 2; i++)
        reference[i] = _mm512_mul_ps(highest(own.scores[0][i], std::min(shape.keys, GROUP)), scale);
    for (auto& some : reference) some = _mm512_max_ps(some, _mm512_set1_ps(LOWEST)); // minus infinity is no reference

    // While vectors take exponentials, the tiles' unit makes the next group's scores, and meets the last block's weights
    // with its values: what comes next in the program has to be there before the processor waits for either.
    for (int64_t group = 0; group < groups; group++) {
        const int64_t block = group / GROUPS, keys = std::min(shape.keys - group * GROUP, GROUP);
        auto& weights = own.weights[block % 2];
        for (int i = 0; i < 2; i++) {
            if (group + 1 < groups)
                score(k + (2 * (group + 1) + i) * steps * SIZE, own.queries, steps,
                      own.scores[(group + 1) % 2][0] + i * TILE * TILE);
            const float* scores = own.scores[group % 2][i];
            bf16* those = weights[group % GROUPS][i];
            __m512 more = keys == GROUP ? weigh<true>(scores, keys, scale, reference[i], those)
                                        : weigh<false>(scores, keys, scale, reference[i], those);
            if (__builtin_expect(_mm512_cmp_ps_mask(more, _mm512_set1_ps(LARGEST), _CMP_NLE_UQ), 0)) {
                // Much larger scores than before, or some that are not finite: all so far relative to these.
                const __m512 now = _mm512_max_ps(reference[i], _mm512_mul_ps(highest(scores, keys), scale));
                const __m512 by = exp2(_mm512_sub_ps(reference[i], now));
                sum[i] = _mm512_mul_ps(sum[i], by);
                for (int64_t d = 0; d < tiles * TILE; d++) {
                    float* some = own.sums + d * QUERIES + i * TILE;
                    _mm512_store_ps(some, _mm512_mul_ps(_mm512_load_ps(some), by));
                }
                for (int64_t g = 0; g < group % GROUPS; g++) rescale_weights(weights[g][i], by);
                for (int64_t g = 0; g < GROUPS; g++) rescale_weights(own.weights[(block + 1) % 2][g][i], by);
                reference[i] = now;
                more = weigh<false>(scores, keys, scale, now, those);
            }
            sum[i] = _mm512_add_ps(sum[i], more);

            if (block == 0) continue;
            const int64_t turn = 2 * (group % GROUPS) + i, turns = 2 * std::min(GROUPS, groups - block * GROUPS);
            for (int64_t d = tiles * turn / turns; d < tiles * (turn + 1) / turns; d++)
                add_values(v + ((block - 1) * GROUPS * tiles + d) * SIZE, tiles, own.weights[(block - 1) % 2][0][0], GROUPS,
                           own.sums + d * TILE * QUERIES);
        }
    }
    const int64_t last = (groups - 1) / GROUPS;
    for (int64_t d = 0; d < tiles; d++)
        add_values(v + (last * GROUPS * tiles + d) * SIZE, tiles, own.weights[last % 2][0][0], groups - last * GROUPS,
                   own.sums + d * TILE * QUERIES);

    for (int i = 0; i < 2; i++) {
        const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), sum[i]);
        for (int64_t start = 0; start < shape.dim; start += TILE) {
            __m512i rows[TILE]; // values by queries
            for (int64_t d = 0; d < TILE; d++) {
                const __m512 some = _mm512_load_ps(own.sums + (start + d) * QUERIES + i * TILE);
                rows[d] = _mm512_castps_si512(_mm512_mul_ps(some, inverse));
            }
            transpose(rows);
            const __mmask16 wide = first_of_32(std::min(shape.dim - start, TILE));
            for (int64_t query = 0; query < std::min(queries - i * TILE, TILE); query++) {
                const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(rows[query]));
                _mm256_mask_storeu_epi16(out + (i * TILE + query) * out_stride + start, wide, narrow);
            }
        }
    }
}

} // namespace

// Asks Linux for this process' use of tiles; 0 where it grants it.
extern "C" int tiles_allowed() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    return static_cast<int>(syscall(SYS_arch_prctl, REQUEST, TILE_DATA));
}

// Values of 16 bits that `attention` needs besides.
extern "C" int64_t attention_scratch(int64_t batch, int64_t heads, int64_t keys, int64_t dim) {
    return batch * heads * Shape{batch, heads, 0, keys, dim}.packed_head();
}

// softmax(scale q k^T) v of q [batch, heads, queries, dim], k and v [batch, heads, keys, dim] -> out, as q; their strides,
// in values, of batch, head and row, one operand's after the other's. Up to 256 values in a head, at least one key.
extern "C" void attention(const bf16* q, const bf16* k, const bf16* v, bf16* out, const Strides* strides, int64_t batch,
                          int64_t heads, int64_t queries, int64_t keys, int64_t dim, float scale, bf16* scratch,
                          int threads) {
    const Shape shape{batch, heads, queries, keys, dim};
    const int64_t blocks = parts(queries, QUERIES), all = batch * heads;
    const auto at = [&](int operand, int64_t head) {
        return head / heads * strides[operand].batch + head % heads * strides[operand].head;
    };
    constexpr float LOG2_E = 1.44269504f;
#pragma omp parallel num_threads(threads)
    {
        const TinyIsZero here;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < 2 * all; i++) {
            const int64_t head = i / 2;
            bf16* packed = scratch + head * shape.packed_head();
            if (i % 2)
                pack_values(v + at(2, head), strides[2].row, shape, packed + shape.packed_keys());
            else
                pack_keys(k + at(1, head), strides[1].row, shape, packed);
        }
        configure_tiles();
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < all * blocks; i++) {
            const int64_t head = i / blocks, first = i % blocks * QUERIES;
            const bf16* packed = scratch + head * shape.packed_head();
            attend(q + at(0, head) + first * strides[0].row, strides[0].row, std::min(queries - first, QUERIES), packed,
                   packed + shape.packed_keys(), shape, scale * LOG2_E, out + at(3, head) + first * strides[3].row,
                   strides[3].row);
        }
        _tile_release();
    }
}

#endif
