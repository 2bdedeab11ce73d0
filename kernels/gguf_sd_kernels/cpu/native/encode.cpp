// Weights in blocks of 32, as GGUF has them, in 8 bits with a scale for each row: what Codes.of_blocks does through torch, in
// one go.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__F16C__)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t BLOCK = 32;       // weights
constexpr float ROUNDING = 3 << 22; // added to a float of less than 2^22, leaves the nearest integer in its low bits

float half(const uint8_t* bytes) {
    uint16_t bits;
    std::memcpy(&bits, bytes, sizeof bits);
    return _cvtsh_ss(bits);
}

// a * b + c, rounded twice, as torch does: compilers join plain operators into one that rounds once.
inline __m512 multiply_add(__m512 a, __m512 b, __m512 c) {
    return _mm512_add_round_ps(a * b, c, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline __m512 floats(__m512i integers) { return _mm512_cvtepi32_ps(integers); }
inline __m128i load(const uint8_t* bytes) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)); }

// The 32 values of a block, in two vectors.
struct Values {
    __m512 part[2];
};

// 16 bytes hold the first 16 values in their low halves, the others in the high ones.
inline Values nibbles(const uint8_t* bytes) {
    const __m512i wide = _mm512_cvtepu8_epi32(load(bytes));
    return {floats(_mm512_and_si512(wide, _mm512_set1_epi32(15))), floats(_mm512_srli_epi32(wide, 4))};
}

struct Q4_0 {
    static constexpr int64_t BYTES = 18;
    static Values of(const uint8_t* block) {
        const __m512 d = _mm512_set1_ps(half(block)), eight = _mm512_set1_ps(8);
        const Values q = nibbles(block + 2);
        return {(q.part[0] - eight) * d, (q.part[1] - eight) * d};
    }
};

struct Q4_1 {
    static constexpr int64_t BYTES = 20;
    static Values of(const uint8_t* block) {
        const __m512 d = _mm512_set1_ps(half(block)), m = _mm512_set1_ps(half(block + 2));
        const Values q = nibbles(block + 4);
        return {multiply_add(q.part[0], d, m), multiply_add(q.part[1], d, m)};
    }
};

struct Q8_0 {
    static constexpr int64_t BYTES = 34;
    static Values of(const uint8_t* block) {
        const __m512 d = _mm512_set1_ps(half(block));
        return {floats(_mm512_cvtepi8_epi32(load(block + 2))) * d, floats(_mm512_cvtepi8_epi32(load(block + 18))) * d};
    }
};

template <class TYPE>
void encode_rows(const uint8_t* blocks, int64_t rows, int64_t columns, int8_t* values, float* scales, int threads) {
    const int64_t count = columns / BLOCK;
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const uint8_t* from = blocks + row * count * TYPE::BYTES;
        __m512 top = _mm512_setzero_ps();
        for (int64_t i = 0; i < count; i++)
            for (const __m512& part : TYPE::of(from + i * TYPE::BYTES).part) top = _mm512_max_ps(_mm512_abs_ps(part), top);
        const float largest = _mm512_reduce_max_ps(top);
        scales[row] = largest > 0 ? largest / 127 : 1;
        const __m512 inverse = _mm512_set1_ps(1 / scales[row]), rounding = _mm512_set1_ps(ROUNDING);
        int8_t* to = values + row * columns;
        for (int64_t i = 0; i < count; i++)
            for (const __m512& part : TYPE::of(from + i * TYPE::BYTES).part) {
                const __m512i codes = _mm512_castps_si512(multiply_add(part, inverse, rounding));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(codes));
                to += BLOCK / 2;
            }
    }
}

} // namespace

// Blocks of Q4_0 (type 0), Q4_1 (1) or Q8_0 (2) to ``values [rows][columns]`` and ``scales [rows]``.
extern "C" void encode(const uint8_t* blocks, int64_t rows, int64_t columns, int32_t type, int8_t* values, float* scales,
                       int threads) {
    const auto run = type == 0 ? encode_rows<Q4_0> : type == 1 ? encode_rows<Q4_1> : encode_rows<Q8_0>;
    run(blocks, rows, columns, values, scales, threads);
}

#endif
