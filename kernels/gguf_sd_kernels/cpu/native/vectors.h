// What kernels here do to vectors of 16 floats.

#pragma once

#include <immintrin.h>

#include <cstdint>

using bf16 = uint16_t;

inline __m512 widen(const bf16* x) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// While it lives, this thread takes numbers below 2^-126 for zero: exponentials far below the largest are such, and
// processors take many times as long for them.
class TinyIsZero {
    const unsigned before = _mm_getcsr();

  public:
    TinyIsZero() { _mm_setcsr(before | 0x8040); } // flush to zero, denormals are zero
    ~TinyIsZero() { _mm_setcsr(before); }
};

// 2^x, to 7.5e-5 of it: a polynomial of the fraction, in [0, 1), that has the least relative error.
inline __m512 exp2(__m512 x) {
    const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    __m512 y = _mm512_set1_ps(0.07802455f);
    for (float factor : {0.22606718f, 0.69583349f, 0.99992523f})
        y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(y, x);
}
