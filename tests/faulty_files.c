/* Faults of storage and clocks, for a process that loads this library first (LD_PRELOAD).
 *
 * FAULTY_PATH     Calls that change a file or folder with this text in its path are refused.
 * FAULTY_ERRNO    The error number of these calls.
 * FAULTY_SECONDS  They are refused for so long after the first one with this FAULTY_PATH.
 * FAULTY_READS    Set: reads are refused too.
 * FAULTY_DELAY    Milliseconds that every write and fsync below FAULTY_ROOT takes longer.
 * FAULTY_CLOCK    Seconds that are added to the time of day.
 * FAULTY_SHADOW   A folder that gets what a loss of power would leave of FAULTY_ROOT: at each
 *                 fsync the content of that file, or the names in that folder, by inode number.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name)

static double seconds_now(void) {
    REAL(int, clock_gettime, clockid_t, struct timespec *);
    struct timespec now;
    real(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

static int refused(const char *path) {
    static double first;
    static char before[PATH_MAX];
    const char *part = getenv("FAULTY_PATH"), *seconds = getenv("FAULTY_SECONDS");
    if (!part || !*part || !path || !strstr(path, part)) return 0;
    if (strcmp(before, part)) {
        first = seconds_now();
        snprintf(before, sizeof before, "%s", part);
    }
    if (seconds_now() - first > (seconds ? atof(seconds) : 1e9)) return 0;
    errno = atoi(getenv("FAULTY_ERRNO"));
    return 1;
}

static const char *path_of(int fd, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, buffer, PATH_MAX - 1);
    if (length < 0) return NULL;
    buffer[length] = 0;
    return buffer;
}

static int is_below_root(const char *path) {
    const char *root = getenv("FAULTY_ROOT");
    return root && path && !strncmp(path, root, strlen(root));
}

/* Whether the call on this descriptor is refused; else it waits as long as it has to. */
static int refused_fd(int fd) {
    char buffer[PATH_MAX];
    if (!getenv("FAULTY_PATH") && !getenv("FAULTY_DELAY")) return 0;
    const char *path = path_of(fd, buffer);
    if (getenv("FAULTY_DELAY") && is_below_root(path)) usleep(1000 * atoi(getenv("FAULTY_DELAY")));
    return refused(path);
}

#define WRITES(name, signature, arguments) \
    ssize_t name signature { \
        REAL(ssize_t, name, signature_##name); \
        return refused_fd(fd) ? -1 : real arguments; \
    }
#define signature_write int, const void *, size_t
#define signature_pwrite int, const void *, size_t, off_t
#define signature_pwrite64 int, const void *, size_t, off64_t
#define signature_writev int, const void *, int
WRITES(write, (int fd, const void *data, size_t size), (fd, data, size))
WRITES(pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
WRITES(pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
WRITES(writev, (int fd, const void *parts, int count), (fd, parts, count))

static int refused_read(int fd) { return getenv("FAULTY_READS") && refused_fd(fd); }

ssize_t read(int fd, void *data, size_t size) {
    REAL(ssize_t, read, int, void *, size_t);
    return refused_read(fd) ? -1 : real(fd, data, size);
}

ssize_t pread64(int fd, void *data, size_t size, off64_t at) {
    REAL(ssize_t, pread64, int, void *, size_t, off64_t);
    return refused_read(fd) ? -1 : real(fd, data, size, at);
}

/* The name of what is kept of a file or folder. */
static void name_kept(char *name, const struct stat *found) {
    snprintf(name, PATH_MAX, "%s/%lu%s", getenv("FAULTY_SHADOW"), (unsigned long)found->st_ino,
             S_ISDIR(found->st_mode) ? ".folder" : "");
}

/* Forgets what an earlier file or folder of the same inode number, gone since, has left. */
static void forget(const char *path) {
    char name[PATH_MAX];
    struct stat found;
    if (!getenv("FAULTY_SHADOW") || !is_below_root(path) || stat(path, &found)) return;
    name_kept(name, &found);
    unlink(name);
}

/* Keeps what the file or folder holds now; under another name first, as a kill may come. */
static void keep(int fd) {
    const char *shadow = getenv("FAULTY_SHADOW");
    char path[PATH_MAX], name[PATH_MAX], partial[PATH_MAX + 8], block[65536];
    struct stat found;
    if (!shadow || !is_below_root(path_of(fd, path)) || fstat(fd, &found)) return;
    name_kept(name, &found);
    snprintf(partial, sizeof partial, "%s.%d", name, fd);
    FILE *copy = fopen(partial, "w");
    if (!copy) abort();
    if (S_ISDIR(found.st_mode)) {
        DIR *folder = opendir(path);
        for (struct dirent *entry; folder && (entry = readdir(folder));)
            fprintf(copy, "%lu/%d/%s\n", (unsigned long)entry->d_ino, entry->d_type == DT_DIR,
                    entry->d_name);
        if (folder) closedir(folder);
    } else {
        FILE *file = fopen(path, "r");
        for (size_t size; file && (size = fread(block, 1, sizeof block, file)) > 0;)
            fwrite(block, 1, size, copy);
        if (file) fclose(file);
    }
    fclose(copy);
    if (renameat(AT_FDCWD, partial, AT_FDCWD, name)) abort();
}

#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, name, const char *, int, ...); \
        va_list rest; \
        va_start(rest, flags); \
        int mode = va_arg(rest, int); \
        va_end(rest); \
        if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && refused(path)) return -1; \
        int is_new = flags & O_CREAT && access(path, F_OK); \
        int result = real(path, flags, mode); \
        if (is_new && result >= 0) forget(path); \
        return result; \
    }
OPENS(open)
OPENS(open64)

int mkdir(const char *path, mode_t mode) {
    REAL(int, mkdir, const char *, mode_t);
    if (refused(path)) return -1;
    int result = real(path, mode);
    if (!result) forget(path);
    return result;
}

int rename(const char *old, const char *new) {
    REAL(int, rename, const char *, const char *);
    return refused(old) || refused(new) ? -1 : real(old, new);
}

int fsync(int fd) {
    REAL(int, fsync, int);
    if (refused_fd(fd)) return -1;
    int result = real(fd);
    keep(fd);
    return result;
}

int fdatasync(int fd) { return fsync(fd); }

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(int, clock_gettime, clockid_t, struct timespec *);
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME && getenv("FAULTY_CLOCK")) now->tv_sec += atol(getenv("FAULTY_CLOCK"));
    return result;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
