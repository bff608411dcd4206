// Threads that take turns: the same interleaving for the same seed.
#ifndef TURNS_H
#define TURNS_H
#include <stdint.h>

/// From here on the calling thread, and every thread that it or one of those starts, run one at a
/// time.  Who goes on is drawn from `seed` wherever a thread waits for a lock, a condition or
/// another thread, and at `turns_pass`.
///
/// A deadlock, and a run without end, stop the program with a message that has the seed.
void turns_begin(uint64_t seed);

/// The other threads have ended, and were joined.  Returns how many turns were taken.
uint64_t turns_end(void);

/// Lets another thread have its turn, where threads take turns.  Returns whether they do.
_Bool turns_pass(void);

/// Whether pread and pwrite of the calling thread transfer less than asked, or are interrupted.
void transfers_be_short(_Bool yes);

#endif
