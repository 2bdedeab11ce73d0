// Products of bytes in AMX's tiles: linear layers and convolutions of codes without a sign and weights with one, and what
// comes after a product: scales, bias, GELU, gates and residuals, while the sums are in the first level of the cache.
//
// A convolution is a product too. Its input has a margin of one pixel all around, so that output pixels that follow one
// another, the margin's columns included, read rows that follow one another: from a start of its own for each tap.

#if defined(__AMX_INT8__) && defined(__AVX512BF16__) && defined(__AVX512DQ__) && defined(__AVX512BW__)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tiles.h"
#include "vectors.h"

namespace {

constexpr int64_t DEPTH = 4 * TILE;  // bytes in a tile's row: what one instruction sums over
constexpr int64_t SIZE = TILE * DEPTH;
constexpr int64_t BLOCK = 2 * TILE;  // rows and columns of results at a time
constexpr int64_t KEPT = 1 << 19;    // bytes of weights, or of x, that are met again: a quarter of the L2 cache
constexpr int64_t TASKS = 4;         // for each thread, at least

// x times the normal distribution's share below x, to 3e-5: the logistic function of an odd polynomial, fitted to it. Beyond
// six deviations nothing is left to tell.
inline __m512 gelu(__m512 x) {
    const auto all = [](float value) { return _mm512_set1_ps(value); };
    const __m512 square = _mm512_min_ps(x * x, all(36));
    __m512 factor = _mm512_fmadd_ps(all(1.01461671e-3f), square, all(-0.106777901f));
    factor = _mm512_fmadd_ps(factor, square, all(-2.30111895f));
    return x * _mm512_rcp14_ps(all(1) + exp2(x * factor));
}

inline void write(bf16* out, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(values));
}

} // namespace

enum After : int32_t { NOTHING = 0, GELU = 1, GATE = 2 };

// Rows of x, one a result: from ``x + row * stride + start`` for each of the taps' starts, ``depth`` bytes each.
struct Input {
    const uint8_t* x;
    int64_t rows, stride, depth, taps;
    const int64_t* starts;
    float scale;
    int32_t zero;
};

// Of ``columns`` results: weights as `pack` leaves them, each column's scale, sum of weights and, unless null, bias.
struct Weights {
    const int8_t* packed;
    int64_t columns;
    const float* scales;
    const int32_t* sums;
    const float* bias;
};

// Row ``line * across + i`` goes to ``out + line * line_step + i * step``, where i is less than ``width``.
struct Output {
    bf16* out;
    const bf16* residual; // laid out as ``out``, or null
    int64_t across, width, line_step, step;
    int32_t after; // with GATE, of each 32 columns the first 16 are values, and the others their gates
};

namespace {

// The sums of 32 rows and columns.
inline void multiply(const uint8_t* x, const Input& input, const int8_t* packed, int32_t* sums) {
    before_tiles();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t tap = 0; tap < input.taps; tap++) {
        const uint8_t *first = x + input.starts[tap], *second = first + TILE * input.stride;
        for (int64_t k = 0; k < input.depth; k += DEPTH, packed += 2 * SIZE) {
            _tile_loadd(4, first + k, input.stride);
            _tile_loadd(6, packed, DEPTH);
            _tile_dpbusd(0, 4, 6);
            _tile_loadd(7, packed + SIZE, DEPTH);
            _tile_dpbusd(1, 4, 7);
            _tile_loadd(5, second + k, input.stride);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 4 * BLOCK);
    _tile_stored(1, sums + TILE, 4 * BLOCK);
    _tile_stored(2, sums + TILE * BLOCK, 4 * BLOCK);
    _tile_stored(3, sums + TILE * BLOCK + TILE, 4 * BLOCK);
}

// What is done to sums, the same for all rows of 32 columns.
struct Finish {
    __m512i shift[2];
    __m512 scale[2], bias[2];

    Finish(const Input& input, const Weights& weights, int64_t column) {
        for (int i = 0; i < 2; i++, column += TILE) {
            shift[i] = _mm512_mullo_epi32(_mm512_loadu_si512(weights.sums + column), _mm512_set1_epi32(-input.zero));
            scale[i] = _mm512_loadu_ps(weights.scales + column) * _mm512_set1_ps(input.scale);
            bias[i] = weights.bias ? _mm512_loadu_ps(weights.bias + column) : _mm512_setzero_ps();
        }
    }

    __m512 of(const int32_t* sums, int i) const {
        const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums + i * TILE), shift[i]);
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale[i], bias[i]);
    }
};

template <int AFTER>
inline void finish(const int32_t* sums, int64_t row, int64_t rows, int64_t column, const Finish& how, const Output& output) {
    int64_t line = row / output.across, i = row % output.across;
    for (int64_t r = 0; r < rows; r++, sums += BLOCK, i++) {
        if (i == output.across) i = 0, line++;
        if (i >= output.width) continue;
        const int64_t place = line * output.line_step + i * output.step;
        if (AFTER == GATE) {
            write(output.out + place + column / 2, how.of(sums, 0) * gelu(how.of(sums, 1)));
            continue;
        }
        for (int j = 0; j < 2; j++) {
            __m512 value = how.of(sums, j);
            if (AFTER == GELU) value = gelu(value);
            const int64_t where = place + column + j * TILE;
            if (output.residual) value += widen(output.residual + where);
            write(output.out + where, value);
        }
    }
}

} // namespace

// Weights [columns][depth] in tiles of 64 by 16, those of 32 columns together; and their sums.
extern "C" void pack(const int8_t* weights, int64_t columns, int64_t depth, int8_t* packed, int32_t* sums, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t column = 0; column < columns; column++) {
        const int8_t* from = weights + column * depth;
        int8_t* to = packed + column / BLOCK * BLOCK * depth + column % BLOCK / TILE * SIZE + column % TILE * 4;
        int32_t sum = 0;
        for (int64_t k = 0; k < depth; k += 4) {
            std::memcpy(to + k / DEPTH * 2 * SIZE + k % DEPTH / 4 * DEPTH, from + k, 4);
            sum += from[k] + from[k + 1] + from[k + 2] + from[k + 3];
        }
        sums[column] = sum;
    }
}

// Columns are a multiple of 32, depth one of 64. With several taps, 32 rows more than there are can be read.
extern "C" void product(const Input* input, const Weights* weights, const Output* output, int threads) {
    const int64_t depth = input->depth * input->taps, blocks = parts(weights->columns, BLOCK);
    // A task is some rows by the columns of as many weights as the cache keeps for them.
    const int64_t group = std::clamp<int64_t>(KEPT / (depth * BLOCK), 1, blocks), groups = parts(blocks, group);
    const int64_t fitting = std::max<int64_t>(KEPT / (input->depth * BLOCK), 1);
    const int64_t size = std::min(parts(parts(input->rows, BLOCK), parts(TASKS * threads, groups)), fitting) * BLOCK;
    const int64_t chunks = parts(input->rows, size);
    const auto done = output->after == GATE ? finish<GATE> : output->after == GELU ? finish<GELU> : finish<NOTHING>;
#pragma omp parallel num_threads(threads)
    {
        const TinyIsZero here;
        alignas(64) int32_t sums[BLOCK * BLOCK];
        std::vector<uint8_t> last; // rows of a linear layer's end, and as many more as a block has
        configure_tiles();
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < groups * chunks; task++) {
            const int64_t first = task % chunks * size, end = std::min(first + size, input->rows);
            const int64_t left = task / chunks * group, right = std::min(left + group, blocks);
            for (int64_t row = first; row < end; row += BLOCK) {
                const int64_t rows = std::min(end - row, BLOCK);
                const uint8_t* x = input->x + row * input->stride;
                if (rows < BLOCK && input->taps == 1) {
                    last.resize(BLOCK * input->stride);
                    std::memcpy(last.data(), x, (rows - 1) * input->stride + input->depth);
                    x = last.data();
                }
                for (int64_t column = left * BLOCK; column < right * BLOCK; column += BLOCK) {
                    multiply(x, *input, weights->packed + column * depth, sums);
                    done(sums, row, rows, column, Finish(*input, *weights, column), *output);
                }
            }
        }
        _tile_release();
    }
}

#endif
