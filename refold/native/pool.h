/* A pool of threads that share out numbered pieces of work.
 *
 * Each thread has a range of pieces and takes them one by one, in order, for memory is then read in
 * long runs; a thread that is done takes from the others' ranges. The caller has a range too: on a
 * machine that has no core to spare it does the work alone instead of waiting for threads that are
 * not scheduled. That is why this is not OpenMP, whose static shares end in a barrier; a second OpenMP
 * runtime beside torch's would also keep its own spinning threads.
 *
 * A thread looks for more work for a moment before it sleeps: to wake it takes as long as a small
 * layer, and the next layer of a network comes soon.
 */
#ifndef REFOLD_POOL_H
#define REFOLD_POOL_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#define MAX_WORKERS 64
#define LOOKS 8000 /* 200 to 500 microseconds */

typedef void piece_fn(void *context, long piece);

static struct {
    pthread_mutex_t caller; /* held by the one call that uses the pool */
    pthread_mutex_t lock;   /* guards what follows, but for next; the counts are read without */
    pthread_cond_t wake, done;
    int workers;       /* helpers that exist */
    atomic_int places; /* of helpers that may still join the present work */
    atomic_int busy;   /* helpers that have joined and not finished */
    piece_fn *work;
    void *context;
    long pieces;
    int core;    /* the caller's, or -1 */
    int threads; /* ranges of pieces: the caller's and one for each place */
    atomic_long next[MAX_WORKERS + 1];
} pool = {.caller = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .done = PTHREAD_COND_INITIALIZER};

static inline void rest(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Looks for a moment whether a count has become zero, or not zero. Who waits must not hold the core
 * that the other needs: systems put both on one. */
static void look(atomic_int *count, int zero) {
    for (int i = 1; i <= LOOKS; i++) {
        if ((atomic_load_explicit(count, memory_order_relaxed) == 0) == zero) return;
        if (i % 16 == 0)
            sched_yield();
        else
            rest();
    }
}

static long range_start(long pieces, int threads, int range) { return pieces * range / threads; }

static void take_pieces(piece_fn *work, void *context, long pieces, int threads, int own) {
    for (int t = 0; t < threads; t++) {
        int range = (own + t) % threads;
        atomic_long *next = pool.next + range;
        long end = range_start(pieces, threads, range + 1);
        for (long i; (i = atomic_fetch_add_explicit(next, 1, memory_order_relaxed)) < end;)
            work(context, i);
    }
}

#if defined(__linux__)
static int present_core(void) { return sched_getcpu(); }

/* Systems wake a thread on the core where it last ran, even if that is the caller's own and another
 * is idle: there it would wait until the work is done. */
static void leave_core(int core) {
    cpu_set_t allowed, others;
    if (core < 0 || core != sched_getcpu()) return;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return; /* 0: of this thread */
    others = allowed;
    CPU_CLR(core, &others);
    if (sched_setaffinity(0, sizeof others, &others) == 0) /* there is another */
        sched_setaffinity(0, sizeof allowed, &allowed);
}
#else
static int present_core(void) { return -1; }
static void leave_core(int core) { (void)core; }
#endif

static void *help(void *unused) {
    (void)unused;
    for (;;) {
        look(&pool.places, 0);
        pthread_mutex_lock(&pool.lock);
        while (pool.places == 0) pthread_cond_wait(&pool.wake, &pool.lock);
        int own = pool.places--, threads = pool.threads;
        pool.busy++;
        piece_fn *work = pool.work;
        void *context = pool.context;
        long pieces = pool.pieces;
        int core = pool.core;
        pthread_mutex_unlock(&pool.lock);
        leave_core(core);
        take_pieces(work, context, pieces, threads, own);
        pthread_mutex_lock(&pool.lock);
        if (--pool.busy == 0) pthread_cond_signal(&pool.done);
        pthread_mutex_unlock(&pool.lock);
    }
    return NULL;
}

/* A forked child has none of the threads, and perhaps a lock that one of them held. */
static void forget_threads(void) {
    pthread_mutex_init(&pool.caller, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.done, NULL);
    pool.workers = pool.places = pool.busy = 0;
}

__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(NULL, NULL, forget_threads);
}

/* Runs work(context, 0 .. pieces - 1) on up to that many threads, the caller's among them. */
static void share_out(piece_fn *work, void *context, long pieces, int threads) {
    int helpers = threads - 1;
    if (helpers > MAX_WORKERS) helpers = MAX_WORKERS;
    if (helpers > pieces - 1) helpers = (int)(pieces - 1);
    if (helpers <= 0 || pthread_mutex_trylock(&pool.caller) != 0) {
        for (long i = 0; i < pieces; i++) work(context, i);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    for (pthread_t thread; pool.workers < helpers; pool.workers++) {
        if (pthread_create(&thread, NULL, help, NULL) != 0) break; /* fewer will do */
        pthread_detach(thread);
    }
    pool.work = work;
    pool.context = context;
    pool.pieces = pieces;
    pool.core = present_core();
    pool.places = helpers;
    pool.threads = threads = helpers + 1;
    for (int t = 0; t < threads; t++) atomic_store(pool.next + t, range_start(pieces, threads, t));
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    take_pieces(work, context, pieces, threads, 0);
    pthread_mutex_lock(&pool.lock);
    pool.places = 0;
    if (pool.busy > 0) {
        pthread_mutex_unlock(&pool.lock);
        look(&pool.busy, 1);
        pthread_mutex_lock(&pool.lock);
    }
    while (pool.busy > 0) pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.caller);
}

#endif
