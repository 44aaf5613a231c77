/* Whether tensors lie where they lay, and count as many writes as they did.
 *
 * The tensors are handles of torch's C interface, and two functions of torch read them: this file
 * knows nothing of how a tensor is stored. Asking one tensor after the other from Python takes five
 * times as long, most of it for memory that only Python reads.
 */
#include <stdint.h>

typedef int address_fn(void *tensor, void **address); /* 0: it has one */
typedef int64_t version_fn(const void *tensor);

/* versions[i] < 0: tensor i counts none, and must not be asked. */
int bcq_unchanged(long count, void *const *tensors, void *const *addresses,
                  const int64_t *versions, address_fn *address_of, version_fn *version_of) {
    for (long i = 0; i < count; i++) {
        void *address;
        if (address_of(tensors[i], &address) != 0 || address != addresses[i]) return 0;
        if (versions[i] >= 0 && version_of(tensors[i]) != versions[i]) return 0;
    }
    return 1;
}
