/* 16 bytes at a time: levels are packed and unpacked so, which every x86-64 has registers for. */
#ifndef LLAMAKIT_BYTES_H
#define LLAMAKIT_BYTES_H

#include <stdint.h>
#include <string.h>

typedef uint8_t bytes16 __attribute__((vector_size(16)));

static inline bytes16 load_16(const void *at) {
    bytes16 x;
    memcpy(&x, at, 16);
    return x;
}

static inline void store_16(void *at, bytes16 x) { memcpy(at, &x, 16); }

#endif
