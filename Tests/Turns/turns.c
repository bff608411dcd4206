// The POSIX locks of a test program, replaced by ones that know of turns.
//
// The definitions here take the place of the C library's in the whole program.  A thread that takes
// no turns is handed on to those.  One that does never sleeps in a lock: it tries, and where the
// lock is taken, another thread goes on until somebody has let go of it.  Where it lets go of one
// itself, now and then another thread goes on, too.
#include "turns.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__has_feature)
#if __has_feature(thread_sanitizer) || __has_feature(address_sanitizer)
#define TURNS_NONE  // The sanitizer must see every thread and lock itself.
#endif
#endif

#ifdef TURNS_NONE
void turns_begin(uint64_t seed) { (void)seed; }
uint64_t turns_end(void) { return 0; }
bool turns_pass(void) { return false; }
#else

struct member {
    struct table *table;
    struct member *next;
    // What it waits for; null where it could go on.
    const void *awaited;
    bool may_time_out, timed_out, has_ended;
    pthread_cond_t turn;
    pthread_t thread;
    pid_t tid;
    void *(*body)(void *);
    void *argument;
};

struct table {
    pthread_mutex_t lock;
    struct member *first, *last, *running;
    uint64_t seed, random, count;
};

static _Thread_local struct member *self;

// More turns than any test takes.
static const uint64_t too_many = 50 * 1000 * 1000;

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int real_lock(pthread_mutex_t *mutex) {
    REAL(pthread_mutex_lock);
    return real(mutex);
}

static int real_unlock(pthread_mutex_t *mutex) {
    REAL(pthread_mutex_unlock);
    return real(mutex);
}

static int real_wait(pthread_cond_t *condition, pthread_mutex_t *mutex) {
    REAL(pthread_cond_wait);
    return real(condition, mutex);
}

static int real_broadcast(pthread_cond_t *condition) {
    REAL(pthread_cond_broadcast);
    return real(condition);
}

// SplitMix64.
static uint64_t draw(struct table *table) {
    uint64_t mixed = (table->random += 0x9E3779B97F4A7C15);
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9;
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB;
    return mixed ^ (mixed >> 31);
}

static void stop(const struct table *table, const char *why) {
    fprintf(stderr, "seed %llu of the turns: %s after %llu turns\n",
            (unsigned long long)table->seed, why, (unsigned long long)table->count);
    abort();
}

// A drawn one of those that wait for nothing, or of those whose wait has a limit.
static struct member *candidate(struct table *table, bool timing_out) {
    uint64_t count = 0;
    struct member *chosen = NULL;
    for (struct member *member = table->first; member; member = member->next) {
        if (member->has_ended) continue;
        bool waits = member->awaited != NULL;
        if (timing_out ? !waits || !member->may_time_out : waits) continue;
        if (draw(table) % ++count == 0) chosen = member;
    }
    return chosen;
}

// Gives the turn to a drawn member; the table is locked.
static void choose(struct table *table) {
    if (++table->count > too_many) stop(table, "no end");
    struct member *next = NULL;
    if (draw(table) % 64 == 0) next = candidate(table, true);
    if (!next) next = candidate(table, false);
    if (!next) next = candidate(table, true);
    if (!next) stop(table, "a deadlock");
    if (next->awaited) {
        next->timed_out = true;
        next->awaited = NULL;
    }
    table->running = next;
    real_broadcast(&next->turn);
}

static void await_turn(struct member *member) {
    while (member->table->running != member) real_wait(&member->turn, &member->table->lock);
}

static void pass(void) {
    struct table *table = self->table;
    real_lock(&table->lock);
    choose(table);
    await_turn(self);
    real_unlock(&table->lock);
}

static void wait_for(const void *object, bool may_time_out) {
    self->awaited = object;
    self->may_time_out = may_time_out;
    self->timed_out = false;
    pass();
}

static void wake(const void *object) {
    for (struct member *member = self->table->first; member; member = member->next)
        if (member->awaited == object) member->awaited = NULL;
}

static struct member *join_table(struct table *table) {
    struct member *member = calloc(1, sizeof *member);
    if (!member) abort();
    member->table = table;
    pthread_cond_init(&member->turn, NULL);
    if (table->last) table->last->next = member;
    else table->first = member;
    table->last = member;
    return member;
}

void turns_begin(uint64_t seed) {
    struct table *table = calloc(1, sizeof *table);
    if (!table || self) abort();
    pthread_mutex_init(&table->lock, NULL);
    table->seed = table->random = seed;
    table->running = join_table(table);
    table->running->tid = gettid();
    self = table->running;
}

uint64_t turns_end(void) {
    struct table *table = self->table;
    self = NULL;
    uint64_t count = table->count;
    for (struct member *member = table->first, *next; member; member = next) {
        next = member->next;
        pthread_cond_destroy(&member->turn);
        free(member);
    }
    pthread_mutex_destroy(&table->lock);
    free(table);
    return count;
}

bool turns_pass(void) {
    if (self) pass();
    return self != NULL;
}

// MARK: Locks

// Others, such as the language's runtime, let go of their locks by themselves.
static bool is_held_by_a_member(const pthread_mutex_t *mutex) {
    for (struct member *member = self->table->first; member; member = member->next)
        if (!member->has_ended && member->tid == mutex->__data.__owner) return true;
    return false;
}

int pthread_mutex_lock(pthread_mutex_t *mutex) {
    if (!self) return real_lock(mutex);
    while (pthread_mutex_trylock(mutex) == EBUSY) {
        if (!is_held_by_a_member(mutex)) return real_lock(mutex);
        wait_for(mutex, false);
    }
    return 0;
}

static int let_go(pthread_mutex_t *mutex) {
    int result = real_unlock(mutex);
    if (self) wake(mutex);
    return result;
}

// The language's runtime may hold something else, which the others wait for without a turn.
static bool is_of_the_program(const void *caller) {
    extern const char __executable_start, etext;
    return (const char *)caller >= &__executable_start && (const char *)caller < &etext;
}

int pthread_mutex_unlock(pthread_mutex_t *mutex) {
    int result = let_go(mutex);
    if (self && is_of_the_program(__builtin_return_address(0)) && draw(self->table) % 8 == 0)
        pass();
    return result;
}

static int wait_on(pthread_cond_t *condition, pthread_mutex_t *mutex, bool may_time_out) {
    let_go(mutex);
    wait_for(condition, may_time_out);
    bool timed_out = self->timed_out;
    pthread_mutex_lock(mutex);
    return timed_out ? ETIMEDOUT : 0;
}

int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex) {
    return self ? wait_on(condition, mutex, false) : real_wait(condition, mutex);
}

// A limit may have passed at any moment: how long that is, nobody looks.
int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex,
                           const struct timespec *limit) {
    REAL(pthread_cond_timedwait);
    return self ? wait_on(condition, mutex, true) : real(condition, mutex, limit);
}

int pthread_cond_broadcast(pthread_cond_t *condition) {
    if (self) wake(condition);
    return real_broadcast(condition);
}

int pthread_cond_signal(pthread_cond_t *condition) {
    REAL(pthread_cond_signal);
    if (self) wake(condition);
    return real(condition);
}

int pthread_rwlock_rdlock(pthread_rwlock_t *lock) {
    REAL(pthread_rwlock_rdlock);
    if (!self) return real(lock);
    while (pthread_rwlock_tryrdlock(lock) == EBUSY) wait_for(lock, false);
    return 0;
}

int pthread_rwlock_wrlock(pthread_rwlock_t *lock) {
    REAL(pthread_rwlock_wrlock);
    if (!self) return real(lock);
    while (pthread_rwlock_trywrlock(lock) == EBUSY) wait_for(lock, false);
    return 0;
}

int pthread_rwlock_unlock(pthread_rwlock_t *lock) {
    REAL(pthread_rwlock_unlock);
    int result = real(lock);
    if (self) wake(lock);
    return result;
}

// MARK: Threads

static void *run(void *argument) {
    struct member *member = argument;
    struct table *table = member->table;
    member->tid = gettid();
    real_lock(&table->lock);
    await_turn(member);
    real_unlock(&table->lock);
    self = member;
    void *result = member->body(member->argument);
    self->has_ended = true;
    wake(member);
    self = NULL;
    real_lock(&table->lock);
    choose(table);
    real_unlock(&table->lock);
    return result;
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*body)(void *),
                   void *argument) {
    REAL(pthread_create);
    if (!self) return real(thread, attributes, body, argument);
    struct member *member = join_table(self->table);
    member->body = body;
    member->argument = argument;
    int code = real(thread, attributes, run, member);
    member->thread = *thread;
    member->has_ended = code != 0;
    return code;
}

int pthread_join(pthread_t thread, void **result) {
    REAL(pthread_join);
    if (!self) return real(thread, result);
    for (struct member *member = self->table->first; member; member = member->next)
        if (member->body && pthread_equal(member->thread, thread)) {
            while (!member->has_ended) wait_for(member, false);
            member->body = NULL;
        }
    return real(thread, result);
}
#endif
