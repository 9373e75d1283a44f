/* Lets User-Mode Linux 6.1 run on processors whose extended state is larger than it expects.
 *
 * It saves and restores its processes' registers by ptrace(2) with NT_X86_XSTATE and a buffer of a
 * size fixed when it was built, which holds AVX-512 but not AMX (2.7 of 11 KiB). The kernel below
 * cuts what is read, but takes nothing back that is not whole (EFAULT), and the guest dies at its
 * first process. So this, preloaded, completes what is written: by state that stands as never used,
 * which it is, as arch_prctl(ARCH_REQ_XCOMP_PERM), without which AMX traps, does not exist in there.
 *
 * Not re-entrant, like its only caller. Called on small stacks: nothing large may lie there.
 * Layout: Intel's manual, volume 1, 13.4: the bits of the parts in use stand at byte 512.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

enum { IN_USE = 512, ALWAYS_THERE = 3, PARTS = 63 };

static long (*kernels)(enum __ptrace_request, ...);
static char state[1 << 16];
static size_t whole; /* bytes, as the kernel says */

__attribute__((constructor)) static void find(void)
{
    kernels = (long (*)(enum __ptrace_request, ...))dlsym(RTLD_NEXT, "ptrace");
}

static long get(long pid)
{
    struct iovec all = {state, sizeof state};
    long result = kernels(PTRACE_GETREGSET, pid, (void *)NT_X86_XSTATE, &all);

    if (result == 0)
        whole = all.iov_len;
    return result;
}

/* The parts that lie within the first `size` bytes (CPUID leaf 13: size in eax, offset in ebx). */
static uint64_t parts_within(size_t size)
{
    static size_t known_for;
    static uint64_t parts;
    unsigned int eax, ebx, ecx, edx;

    if (known_for == size)
        return parts;
    parts = ALWAYS_THERE;
    for (unsigned int part = 2; part < PARTS; part++)
        if (__get_cpuid_count(13, part, &eax, &ebx, &ecx, &edx) && eax && ebx + eax <= size)
            parts |= 1ULL << part;
    known_for = size;
    return parts;
}

long ptrace(enum __ptrace_request request, ...)
{
    va_list rest;
    va_start(rest, request);
    long pid = va_arg(rest, long);
    void *address = va_arg(rest, void *);
    struct iovec *given = va_arg(rest, struct iovec *);
    va_end(rest);

    if (address != (void *)NT_X86_XSTATE
        || (request != PTRACE_GETREGSET && request != PTRACE_SETREGSET))
        return kernels(request, pid, address, given);
    if ((request == PTRACE_GETREGSET || whole == 0) && get(pid) != 0)
        return -1;
    size_t size = given->iov_len < whole ? given->iov_len : whole;
    if (request == PTRACE_GETREGSET) {
        memcpy(given->iov_base, state, size);
        given->iov_len = size;
        return 0;
    }
    uint64_t in_use;
    memset(state, 0, whole);
    memcpy(state, given->iov_base, size);
    memcpy(&in_use, state + IN_USE, sizeof in_use);
    in_use &= parts_within(size);
    memcpy(state + IN_USE, &in_use, sizeof in_use);
    struct iovec all = {state, whole};
    return kernels(request, pid, address, &all);
}
