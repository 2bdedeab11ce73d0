// AMX's tiles, all of one size: eight registers of 16 rows of 64 bytes.

#pragma once

#include <immintrin.h>

#include <cstdint>

constexpr int64_t TILE = 16; // rows of a tile, and its columns of 32 bits

constexpr int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

inline void configure_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t column_bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) config.column_bytes[i] = 64, config.rows[i] = TILE;
    _tile_loadconfig(&config);
}

// Loads of tiles tell the compiler nothing of the memory they read: what was stored before has to be there.
inline void before_tiles() { asm volatile("" ::: "memory"); }
