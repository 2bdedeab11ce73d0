// Activations of bfloat16 in 8 bits, and the norms before them in the same two passes: one for the range, one that writes.
//
// Codes are those of gguf_sd_kernels.cpu.int8.quantize, but for the norms' results, which stay in float32 here.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

using Floats = __m512;

constexpr int64_t WIDTH = 16;       // values in a vector
constexpr float ROUNDING = 3 << 22; // added to a float of less than 2^22, leaves the nearest integer in its low bits
constexpr float SMALLEST = 1e-30f;  // a step; less is nothing
constexpr float LOWEST_SILU = -0.27846454f, AT = -1.2784645f; // the smallest value of SiLU, and where it is
constexpr int64_t ROWS = 64;        // at a time, of a group norm's channels, before their sums are joined in 64 bits
constexpr int64_t SAMPLES = 32;     // rows that a channel's mean is guessed from
constexpr int64_t WORTH = 1 << 14;  // values that a thread of its own is worth

inline Floats load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* x, Floats values) { _mm512_storeu_ps(x, values); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats lesser(Floats a, Floats b) { return _mm512_min_ps(a, b); } // b, where one is not a number
inline Floats greater(Floats a, Floats b) { return _mm512_max_ps(a, b); }

// x / (1 + exp(-x)), to 1e-4 of it.
inline Floats silu(Floats x) { return x * _mm512_rcp14_ps(all(1) + exp2(x * all(-1.44269504f))); }

float silu(float x) { return x < -700 ? -0.0f : static_cast<float>(x / (1 + std::exp(-static_cast<double>(x)))); }

struct Range {
    Floats low = all(0), high = all(0), odd = all(0); // zero belongs to it; odd is NaN where a value was not finite

    void add(Floats x) {
        low = lesser(x, low);
        high = greater(x, high);
        odd += x * all(0);
    }
};

struct Ends {
    float low, high; // NaN where a value is not finite
};

Ends ends(const Range& range) {
    const float odd = _mm512_reduce_add_ps(range.odd);
    return {_mm512_reduce_min_ps(range.low) + odd, _mm512_reduce_max_ps(range.high) + odd};
}

Ends joined(const Ends* each, int64_t count) {
    Ends range{0, 0};
    float odd = 0;
    for (int64_t i = 0; i < count; i++) {
        odd += each[i].low * 0 + each[i].high * 0;
        range.low = std::min(range.low, each[i].low);
        range.high = std::max(range.high, each[i].high);
    }
    return {range.low + odd, range.high + odd};
}

} // namespace

struct Code { // value = scale * (code - zero)
    float scale;
    int32_t zero;
};

namespace {

// How values of a range are written; a step of nothing writes zeros.
struct Encoder {
    float inverse, offset;

    static Encoder of(Ends range, bool after_silu, Code* code) {
        if (after_silu) {
            range.low = std::isfinite(range.low) ? (range.low < AT ? LOWEST_SILU : silu(range.low)) : NAN;
            range.high = std::isfinite(range.high) ? silu(range.high) : NAN;
        }
        const float scale = static_cast<float>((double(range.high) - range.low) / 255);
        *code = {1, 0};
        if (!std::isfinite(scale)) code->scale = NAN;
        if (!(scale >= SMALLEST) || !std::isfinite(scale)) return {0, ROUNDING};
        *code = {scale, static_cast<int32_t>(std::nearbyint(-range.low / scale))};
        return {1 / scale, ROUNDING + code->zero};
    }

    void write(Floats x, uint8_t* out) const {
        // Beyond the ends is only what rounding, and the SiLU here, leave there.
        const Floats codes = lesser(greater(x * all(inverse) + all(offset), all(ROUNDING)), all(ROUNDING + 255));
        const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_castps_si512(codes));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
    }
};

int team(int64_t values, int threads) { return static_cast<int>(std::clamp<int64_t>(values / WORTH, 1, threads)); }

struct Part {
    int64_t first, last;
};

// This thread's of ``count``.
Part own(int64_t count) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return {count * thread / threads, count * (thread + 1) / threads};
}

// Where rows of codes go: one behind the other, or, of a map with ``line`` pixels in a line, with a margin of one pixel all
// around.
struct Places {
    int64_t rows, width, line;

    int64_t of(int64_t row) const {
        return (line ? (row / line + 1) * (line + 2) + row % line + 1 : row) * width;
    }

    // This thread's part of the margin, in codes of zero.
    void fill_margin(uint8_t* out, uint8_t zero) const {
        if (!line) return;
        const int64_t lines = rows / line + 2, across = (line + 2) * width;
        const Part part = own(lines);
        for (int64_t i = part.first; i < part.last; i++) {
            uint8_t* start = out + i * across;
            const bool whole = i == 0 || i == lines - 1;
            std::memset(start, zero, whole ? across : width);
            std::memset(start + across - width, zero, width);
        }
    }
};

// Sums and extremes of channels, relative to about their mean: of some rows, spread over all.
struct Channels {
    double *sums, *squares;
    float *lows, *highs, *shifts;

    static constexpr int64_t FIELDS = 8; // of 32 bits, one to spare for the alignment of those of 64
    Channels(float* memory, int64_t channels)
        : sums(reinterpret_cast<double*>(memory)), squares(sums + channels), lows(memory + 4 * channels),
          highs(lows + channels), shifts(highs + channels) {}

    void shift(const bf16* x, int64_t rows, int64_t channels) {
        const int64_t some = std::min(rows, SAMPLES);
        for (int64_t c = 0; c < channels; c += WIDTH) {
            Floats sum = all(0);
            for (int64_t i = 0; i < some; i++) sum += widen(x + rows * i / some * channels + c);
            store(shifts + c, sum * all(1.0f / some));
        }
    }

    void add(const bf16* x, Part rows, int64_t channels) {
        std::memset(sums, 0, (FIELDS - 2) * channels * sizeof(float)); // but for the shifts
        for (int64_t start = rows.first; start < rows.last; start += ROWS)
            for (int64_t c = 0; c < channels; c += WIDTH) {
                const Floats shift = load(shifts + c);
                Floats sum = all(0), square = all(0), low = load(lows + c), high = load(highs + c);
                for (int64_t row = start; row < std::min(start + ROWS, rows.last); row++) {
                    const Floats value = widen(x + row * channels + c) - shift;
                    sum += value;
                    square += value * value;
                    low = lesser(value, low);
                    high = greater(value, high);
                }
                join(sums + c, sum);
                join(squares + c, square);
                store(lows + c, low);
                store(highs + c, high);
            }
    }

    static void join(double* to, Floats some) {
        for (int64_t half = 0; half < 2; half++, to += WIDTH / 2) {
            const __m512d wide = _mm512_cvtps_pd(half ? _mm512_extractf32x8_ps(some, 1) : _mm512_castps512_ps256(some));
            _mm512_storeu_pd(to, _mm512_loadu_pd(to) + wide);
        }
    }

    void join(const Channels& other, int64_t channels) {
        for (int64_t c = 0; c < channels; c++) {
            sums[c] += other.sums[c];
            squares[c] += other.squares[c];
            lows[c] = std::min(lows[c], other.lows[c]);
            highs[c] = std::max(highs[c], other.highs[c]);
        }
    }
};

} // namespace

// ``rows`` of ``width``, or SiLU of them; ``line``, unless it is 0, has rows in a line of the map that is given a margin.
extern "C" void quantize(const bf16* x, int64_t rows, int64_t width, int64_t line, int after_silu, uint8_t* out, Code* code,
                         int threads) {
    Ends each[256];
    Encoder encoder{};
    const Places places{rows, width, line};
    const int64_t whole = width / WIDTH * WIDTH;
    const __mmask16 rest = (1u << (width - whole)) - 1;
    const auto remainder = [&](const bf16* from) {
        const __m256i halves = _mm256_maskz_loadu_epi16(rest, from + whole);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    };
#pragma omp parallel num_threads(std::min(team(rows * width, threads), 256))
    {
        const TinyIsZero here;
        const Part part = own(rows);
        Range range;
        for (int64_t row = part.first; row < part.last; row++) {
            const bf16* from = x + row * width;
            for (int64_t i = 0; i < whole; i += WIDTH) range.add(widen(from + i));
            if (rest) range.add(remainder(from));
        }
        each[omp_get_thread_num()] = ends(range);
#pragma omp barrier
#pragma omp single
        encoder = Encoder::of(joined(each, omp_get_num_threads()), after_silu, code);
        for (int64_t row = part.first; row < part.last; row++) {
            const bf16* from = x + row * width;
            uint8_t* to = out + places.of(row);
            for (int64_t i = 0; i < whole; i += WIDTH)
                encoder.write(after_silu ? silu(widen(from + i)) : widen(from + i), to + i);
            if (!rest) continue;
            uint8_t codes[WIDTH];
            encoder.write(after_silu ? silu(remainder(from)) : remainder(from), codes);
            std::memcpy(to + whole, codes, width - whole);
        }
        places.fill_margin(out, static_cast<uint8_t>(code->zero));
    }
}

// The layer norm of ``rows`` of ``width`` values, a multiple of 16; ``scratch`` has 2 floats a row.
extern "C" void layer_norm_quantize(const bf16* x, int64_t rows, int64_t width, const float* weight, const float* bias,
                                    float eps, float* scratch, uint8_t* out, Code* code, int threads) {
    Ends each[256];
    Encoder encoder{};
#pragma omp parallel num_threads(std::min(team(rows * width, threads), 256))
    {
        const TinyIsZero here;
        const Part part = own(rows);
        Range range;
        for (int64_t row = part.first; row < part.last; row++) {
            const bf16* values = x + row * width;
            const float first = widen(values)[0];
            Floats sums = all(0), squares = all(0);
            for (int64_t c = 0; c < width; c += WIDTH) {
                const Floats value = widen(values + c) - all(first);
                sums += value;
                squares += value * value;
            }
            const float mean = _mm512_reduce_add_ps(sums) / width;
            const float variance = std::max(_mm512_reduce_add_ps(squares) / width - mean * mean, 0.0f);
            const float factor = 1 / std::sqrt(variance + eps), shift = -(first + mean) * factor;
            scratch[2 * row] = factor;
            scratch[2 * row + 1] = shift;
            for (int64_t c = 0; c < width; c += WIDTH)
                range.add((widen(values + c) * all(factor) + all(shift)) * load(weight + c) + load(bias + c));
        }
        each[omp_get_thread_num()] = ends(range);
#pragma omp barrier
#pragma omp single
        encoder = Encoder::of(joined(each, omp_get_num_threads()), false, code);
        for (int64_t row = part.first; row < part.last; row++) {
            const float factor = scratch[2 * row], shift = scratch[2 * row + 1];
            for (int64_t i = row * width, c = 0; c < width; c += WIDTH)
                encoder.write((widen(x + i + c) * all(factor) + all(shift)) * load(weight + c) + load(bias + c), out + i + c);
        }
    }
}

// The group norm of ``rows`` of ``channels``, a multiple of 16, or SiLU of it, with a margin as `quantize` has it; ``scratch``
// has 8 floats a channel and thread, at an address for doubles.
extern "C" void group_norm_quantize(const bf16* x, int64_t rows, int64_t channels, int64_t line, int64_t groups,
                                    const float* weight, const float* bias, float eps, int after_silu, float* scratch, uint8_t* out, Code* code, int threads) {
    Encoder encoder{};
    Channels total(scratch, channels);
    const Places places{rows, channels, line};
#pragma omp parallel num_threads(team(rows * channels, threads))
    {
        const TinyIsZero here;
        const Part part = own(rows);
        Channels mine(scratch + omp_get_thread_num() * Channels::FIELDS * channels, channels);
        mine.shift(x, rows, channels);
        mine.add(x, part, channels);
#pragma omp barrier
#pragma omp single
        {
            for (int64_t t = 1; t < omp_get_num_threads(); t++)
                total.join(Channels(scratch + t * Channels::FIELDS * channels, channels), channels);
            const int64_t size = channels / groups;
            Ends range{0, 0};
            float odd = 0;
            for (int64_t start = 0; start < channels; start += size) {
                // The group's mean and variance, from those of its channels.
                double mean = 0, square = 0;
                for (int64_t c = start; c < start + size; c++) {
                    const double shift = total.shifts[c], center = total.sums[c] / rows;
                    mean += shift + center;
                    square += total.squares[c] / rows + shift * (2 * center + shift);
                }
                mean /= size;
                const double variance = std::max(square / size - mean * mean, 0.0);
                // From here lows and highs hold what a value is multiplied by, and what is added to it.
                for (int64_t c = start; c < start + size; c++) {
                    const float shift = total.shifts[c];
                    const float factor = static_cast<float>(weight[c] / std::sqrt(variance + eps));
                    const float added = static_cast<float>(bias[c] - mean * factor);
                    const float a = (total.lows[c] + shift) * factor + added, b = (total.highs[c] + shift) * factor + added;
                    range = {std::min({range.low, a, b}), std::max({range.high, a, b})};
                    odd += a * 0 + b * 0;
                    total.lows[c] = factor;
                    total.highs[c] = added;
                }
            }
            encoder = Encoder::of({range.low + odd, range.high + odd}, after_silu, code);
        }
        for (int64_t row = part.first; row < part.last; row++)
            for (int64_t from = row * channels, to = places.of(row), c = 0; c < channels; c += WIDTH) {
                const Floats value = widen(x + from + c) * load(total.lows + c) + load(total.highs + c);
                encoder.write(after_silu ? silu(value) : value, out + to + c);
            }
        places.fill_margin(out, static_cast<uint8_t>(code->zero));
    }
}

#endif
