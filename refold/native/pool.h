/* A pool of threads that share out numbered pieces of work.
 *
 * Pieces are taken one by one from a counter, and the caller takes them too: on a machine that
 * has no core to spare the caller does the work alone instead of waiting for threads that are not
 * scheduled. That is why this is not OpenMP, whose static shares end in a barrier; a second OpenMP
 * runtime beside torch's would also keep its own spinning threads.
 *
 * A thread looks for more work for a moment before it sleeps: to wake it takes as long as a small
 * layer, and the next layer of a network comes soon.
 */
#ifndef REFOLD_POOL_H
#define REFOLD_POOL_H

#include <pthread.h>
#include <stdatomic.h>

#define MAX_WORKERS 64
#define LOOKS 8000 /* 100 to 400 microseconds */

typedef void piece_fn(void *context, long piece);

static struct {
    pthread_mutex_t caller; /* held by the one call that uses the pool */
    pthread_mutex_t lock;   /* guards what follows, but for next; the counts are read without */
    pthread_cond_t wake, done;
    int workers;       /* threads that exist */
    atomic_int places; /* of helpers that may still join the present work */
    atomic_int busy;   /* helpers that have joined and not finished */
    piece_fn *work;
    void *context;
    long pieces;
    atomic_long next;
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

/* Looks for a moment whether a count has become zero, or not zero. */
static void look(atomic_int *count, int zero) {
    for (int i = 0; i < LOOKS; i++) {
        if ((atomic_load_explicit(count, memory_order_relaxed) == 0) == zero) return;
        rest();
    }
}

static void take_pieces(piece_fn *work, void *context, long pieces) {
    for (long i; (i = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed)) < pieces;)
        work(context, i);
}

static void *help(void *unused) {
    (void)unused;
    for (;;) {
        look(&pool.places, 0);
        pthread_mutex_lock(&pool.lock);
        while (pool.places == 0) pthread_cond_wait(&pool.wake, &pool.lock);
        pool.places--;
        pool.busy++;
        piece_fn *work = pool.work;
        void *context = pool.context;
        long pieces = pool.pieces;
        pthread_mutex_unlock(&pool.lock);
        take_pieces(work, context, pieces);
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
    pool.places = helpers;
    atomic_store(&pool.next, 0);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    take_pieces(work, context, pieces);
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
