// Transfers that the system cuts short, as it may: for a thread that asked for it.
#include "turns.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdbool.h>
#include <sys/types.h>

static _Thread_local bool is_short;
static _Thread_local unsigned number;

void transfers_be_short(bool yes) { is_short = yes; }

// Some bytes at least; now and then a signal comes first.
static bool is_interrupted(size_t *count) {
    if (!is_short || *count == 0) return false;
    number = number * 1103515245 + 12345;
    if (number >> 16 & 7) *count = 1 + (number >> 8) % *count;
    else errno = EINTR;
    return (number >> 16 & 7) == 0;
}

ssize_t pread(int descriptor, void *buffer, size_t count, off_t offset) {
    static ssize_t (*real)(int, void *, size_t, off_t);
    if (!real) real = (ssize_t (*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread");
    return is_interrupted(&count) ? -1 : real(descriptor, buffer, count, offset);
}

ssize_t pwrite(int descriptor, const void *buffer, size_t count, off_t offset) {
    static ssize_t (*real)(int, const void *, size_t, off_t);
    if (!real) real = (ssize_t (*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite");
    return is_interrupted(&count) ? -1 : real(descriptor, buffer, count, offset);
}
