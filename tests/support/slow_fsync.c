// A disk whose every fsync takes 200 ms longer, for any program that is started with this library preloaded:
//
//     cc -shared -fPIC -o build/slow_fsync.so tests/support/slow_fsync.c -ldl
//     LD_PRELOAD=$PWD/build/slow_fsync.so make test
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>

static int late(const char *name, int fd) {
    const struct timespec delay = {0, 200 * 1000 * 1000};
    nanosleep(&delay, NULL);
    return ((int (*)(int))dlsym(RTLD_NEXT, name))(fd);
}

int fsync(int fd) { return late("fsync", fd); }

int fdatasync(int fd) { return late("fdatasync", fd); }
