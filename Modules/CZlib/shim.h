// The door to zlib.  Its initializers are macros, which Swift does not see.
#pragma once
#include <zlib.h>

// A decoder of raw deflate streams whose distances may span `window_bits` bits.
static inline int qcowfs_inflate_init(z_stream *stream, int window_bits) {
    return inflateInit2(stream, -window_bits);
}

// An encoder of raw deflate streams.  The format allows no window over 12 bits.
static inline int qcowfs_deflate_init(z_stream *stream, int level, int window_bits) {
    return deflateInit2(stream, level, Z_DEFLATED, -window_bits, 9, Z_DEFAULT_STRATEGY);
}
