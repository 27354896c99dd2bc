// Writes down what a program does to the files below a folder, so that tests can rebuild the folder as a power cut
// would have left it after any of these operations (see power_cut.py):
//
//     cc -shared -fPIC -o power_cut.so tests/support/power_cut.c -ldl -lpthread
//     LD_PRELOAD=$PWD/power_cut.so PYTHON_POWER_ROOT=/folder PYTHON_POWER_JOURNAL=/elsewhere/journal program
//
// A record is a line `operation inode length-of-name length-of-other length-of-data`, then these three. Content is read
// from the file when it is synced, and when it is closed: however it was written.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define PLACE (2 * PATH_MAX)

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static int turn_of_processes = -1;

static void begin_anew(void) { pthread_mutex_init(&turn, NULL); }

__attribute__((constructor)) static void prepare(void) { pthread_atfork(NULL, NULL, begin_anew); }

// One operation at a time, in all threads and processes, so that records are in the order of what was done.
static void enter(void) {
    char path[PATH_MAX];
    pthread_mutex_lock(&turn);
    snprintf(path, sizeof path, "%s.turn", getenv("PYTHON_POWER_JOURNAL") ? getenv("PYTHON_POWER_JOURNAL") : "/nowhere");
    turn_of_processes = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (turn_of_processes >= 0) syscall(SYS_flock, turn_of_processes, LOCK_EX);
}

static void leave(void) {
    int error = errno;
    if (turn_of_processes >= 0) {
        // Not by closing alone: a process that was forked meanwhile has it open too.
        syscall(SYS_flock, turn_of_processes, LOCK_UN);
        syscall(SYS_close, turn_of_processes);
    }
    pthread_mutex_unlock(&turn);
    errno = error;
}

// Whether a path is below the folder, and its name from there on.
static int below(const char *path, char *name) {
    const char *root = getenv("PYTHON_POWER_ROOT");
    size_t length = root ? strlen(root) : 0;
    if (!length || strncmp(path, root, length) || (path[length] && path[length] != '/')) return 0;
    snprintf(name, PLACE, "%s", path[length] ? path + length + 1 : ".");
    return 1;
}

static int behind(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return !strstr(path, " (deleted)");
}

static int place(int folder, const char *path, char *name) {
    char whole[PLACE], base[PATH_MAX];
    if (path[0] == '/') return below(path, name);
    if (folder == AT_FDCWD ? !getcwd(base, sizeof base) : !behind(folder, base)) return 0;
    snprintf(whole, sizeof whole, "%s/%s", base, path);
    return below(whole, name);
}

static void put(const char *operation, unsigned long inode, const char *name, const char *other, const char *data,
                size_t size) {
    const char *journal = getenv("PYTHON_POWER_JOURNAL");
    size_t names = strlen(name), others = strlen(other);
    char *record = malloc(128 + names + others + size), *end = record;
    if (!journal || !record) abort();
    end += sprintf(end, "%s %lu %zu %zu %zu\n", operation, inode, names, others, size);
    end = mempcpy(mempcpy(mempcpy(end, name, names), other, others), data, size);
    int fd = syscall(SYS_openat, AT_FDCWD, journal, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    // One write: records of several processes do not mix.
    if (fd < 0 || syscall(SYS_write, fd, record, (size_t)(end - record)) != end - record) abort();
    syscall(SYS_close, fd);
    free(record);
}

static void put_content(const char *operation, int source, const char *name) {
    char link[64];
    struct stat found;
    snprintf(link, sizeof link, "/proc/self/fd/%d", source);
    int fd = syscall(SYS_openat, AT_FDCWD, link, O_RDONLY | O_CLOEXEC, 0);
    if (fd < 0) return;
    if (fstat(fd, &found) == 0) {
        char *data = malloc(found.st_size + 1);
        ssize_t size = data ? pread(fd, data, found.st_size, 0) : -1;
        if (size >= 0) put(operation, found.st_ino, name, "", data, size);
        free(data);
    }
    syscall(SYS_close, fd);
}

static unsigned long inode_of(int folder, const char *path) {
    struct stat found;
    return fstatat(folder, path, &found, AT_SYMLINK_NOFOLLOW) ? 0 : found.st_ino;
}

static int is_written(int fd, char *name) {
    char path[PATH_MAX];
    struct stat found;
    int flags = fcntl(fd, F_GETFL);
    return flags >= 0 && (flags & O_ACCMODE) != O_RDONLY && !fstat(fd, &found) && S_ISREG(found.st_mode) &&
           behind(fd, path) && below(path, name);
}

static void opened(int fd, int was_there, int flags) {
    char name[PLACE];
    struct stat found;
    if (fd < 0 || !is_written(fd, name) || fstat(fd, &found)) return;
    put(was_there ? flags & O_TRUNC ? "truncate" : "open" : "create", found.st_ino, name, "", "", 0);
}

static int open_it(const char *symbol, int folder, const char *path, int flags, mode_t mode) {
    int (*real)(int, const char *, int, ...) = dlsym(RTLD_NEXT, symbol);
    char name[PLACE];
    if ((flags & O_ACCMODE) == O_RDONLY || !place(folder, path, name)) return real(folder, path, flags, mode);
    enter();
    int was_there = inode_of(folder, path) != 0, fd = real(folder, path, flags, mode), error = errno;
    opened(fd, was_there, flags);
    leave();
    errno = error;
    return fd;
}

#define OPEN(symbol, at, folder, ...)                          \
    int symbol(__VA_ARGS__ const char *path, int flags, ...) { \
        va_list more;                                          \
        va_start(more, flags);                                 \
        mode_t mode = va_arg(more, int);                       \
        va_end(more);                                          \
        return open_it(at, folder, path, flags, mode);         \
    }
#define COMMA ,
OPEN(open, "openat", AT_FDCWD, )
OPEN(open64, "openat64", AT_FDCWD, )
OPEN(openat, "openat", folder, int folder COMMA)
OPEN(openat64, "openat64", folder, int folder COMMA)

static FILE *fopen_it(const char *symbol, const char *path, const char *mode) {
    FILE *(*real)(const char *, const char *) = dlsym(RTLD_NEXT, symbol);
    char name[PLACE];
    if (!strpbrk(mode, "wa+") || !place(AT_FDCWD, path, name)) return real(path, mode);
    enter();
    int was_there = inode_of(AT_FDCWD, path) != 0;
    FILE *file = real(path, mode);
    if (file) opened(fileno(file), was_there, mode[0] == 'w' ? O_TRUNC : 0);
    leave();
    return file;
}

FILE *fopen(const char *path, const char *mode) { return fopen_it("fopen", path, mode); }

FILE *fopen64(const char *path, const char *mode) { return fopen_it("fopen64", path, mode); }

int close(int fd) {
    char name[PLACE];
    if (!getenv("PYTHON_POWER_ROOT") || !is_written(fd, name)) return syscall(SYS_close, fd);
    enter();
    put_content("close", fd, name);
    int result = syscall(SYS_close, fd);
    leave();
    return result;
}

int fclose(FILE *file) {
    char name[PLACE];
    if (getenv("PYTHON_POWER_ROOT") && is_written(fileno(file), name)) {
        fflush(file);
        enter();
        put_content("close", fileno(file), name);
        leave();
    }
    return REAL(fclose)(file);
}

static int sync_it(const char *symbol, int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, symbol);
    char path[PATH_MAX], name[PLACE];
    struct stat found;
    enter();
    int result = real(fd), error = errno;
    if (!result && !fstat(fd, &found) && behind(fd, path) && below(path, name)) {
        if (S_ISDIR(found.st_mode)) put("sync-folder", found.st_ino, name, "", "", 0);
        else put_content("sync", fd, name);
    }
    leave();
    errno = error;
    return result;
}

int fsync(int fd) { return sync_it("fsync", fd); }

int fdatasync(int fd) { return sync_it("fdatasync", fd); }

// One name.
static int change(const char *operation, int folder, const char *path, int result, int error) {
    char name[PLACE];
    if (!result && place(folder, path, name)) put(operation, inode_of(folder, path), name, "", "", 0);
    errno = error;
    return result;
}

#define CHANGE(signature, operation, folder, call)                 \
    signature {                                                    \
        enter();                                                   \
        int done = call;                                           \
        int result = change(operation, folder, path, done, errno); \
        leave();                                                   \
        return result;                                             \
    }
CHANGE(int mkdir(const char *path, mode_t mode), "mkdir", AT_FDCWD, REAL(mkdir)(path, mode))
CHANGE(int mkdirat(int folder, const char *path, mode_t mode), "mkdir", folder, REAL(mkdirat)(folder, path, mode))
CHANGE(int rmdir(const char *path), "remove", AT_FDCWD, REAL(rmdir)(path))
CHANGE(int unlink(const char *path), "remove", AT_FDCWD, REAL(unlink)(path))
CHANGE(int unlinkat(int folder, const char *path, int flags), "remove", folder, REAL(unlinkat)(folder, path, flags))

// Two names, of which both are below the folder.
static int change_two(const char *operation, int from, const char *old, int to, const char *path, int result, int error) {
    char name[PLACE], other[PLACE];
    if (!result && place(to, path, name) && place(from, old, other))
        put(operation, inode_of(to, path), other, name, "", 0);
    errno = error;
    return result;
}

#define CHANGE_TWO(signature, operation, from, to, call)                      \
    signature {                                                               \
        enter();                                                              \
        int done = call;                                                      \
        int result = change_two(operation, from, old, to, path, done, errno); \
        leave();                                                              \
        return result;                                                        \
    }
CHANGE_TWO(int rename(const char *old, const char *path), "rename", AT_FDCWD, AT_FDCWD, REAL(rename)(old, path))
CHANGE_TWO(int renameat(int from, const char *old, int to, const char *path), "rename", from, to,
           REAL(renameat)(from, old, to, path))
CHANGE_TWO(int link(const char *old, const char *path), "link", AT_FDCWD, AT_FDCWD, REAL(link)(old, path))
CHANGE_TWO(int linkat(int from, const char *old, int to, const char *path, int flags), "link", from, to,
           REAL(linkat)(from, old, to, path, flags))

static int put_symlink(const char *target, int folder, const char *path, int result, int error) {
    char name[PLACE];
    if (!result && place(folder, path, name)) put("symlink", inode_of(folder, path), name, target, "", 0);
    errno = error;
    return result;
}

int symlink(const char *target, const char *path) {
    enter();
    int done = REAL(symlink)(target, path);
    int result = put_symlink(target, AT_FDCWD, path, done, errno);
    leave();
    return result;
}

int symlinkat(const char *target, int folder, const char *path) {
    enter();
    int done = REAL(symlinkat)(target, folder, path);
    int result = put_symlink(target, folder, path, done, errno);
    leave();
    return result;
}
