// The door to what Linux has and Swift's Glibc module leaves out: fstatfs; and to memory that is
// there from the start.
#pragma once
#include <sys/statfs.h>

#define QCOWFS_ZERO_AREA_SIZE (1 << 20)

// Zeros that nobody writes to.  They lie in .bss, so every page of them is the kernel's zero page,
// and no call can fail to provide them; Swift has no such array.
static inline const void *_Nonnull qcowfs_zero_area(void) {
    static char zeros[QCOWFS_ZERO_AREA_SIZE] __attribute__((aligned(4096)));
    return zeros;
}
