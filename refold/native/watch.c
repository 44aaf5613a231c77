/* Whether tensors lie where they lay, count as many writes as they did and hold what they held.
 *
 * The tensors are handles of torch's C interface, and two functions of torch read them: this file
 * knows nothing of how a tensor is stored. Asking one tensor after the other from Python takes
 * several times as long, most of it for memory that only Python reads.
 */
#include <stdint.h>
#include <string.h>

typedef struct {
    void *tensor;
    void *address;
    int64_t version;     /* negative: it counts none, and must not be asked */
    const void *content; /* NULL: not compared */
    int64_t size;        /* of the content, in bytes */
} seen_t;

typedef int address_fn(void *tensor, void **address); /* 0: it has one */
typedef int64_t version_fn(const void *tensor);

int watch_unchanged(long count, const seen_t *seen, address_fn *address_of,
                    version_fn *version_of) {
    for (long i = 0; i < count; i++) {
        const seen_t *s = seen + i;
        void *address;
        if (address_of(s->tensor, &address) != 0 || address != s->address) return 0;
        if (s->version >= 0 && version_of(s->tensor) != s->version) return 0;
        if (s->content && memcmp(address, s->content, (size_t)s->size) != 0) return 0;
    }
    return 1;
}
