/* Preloaded into a program under test: its N-th input or output on files below a folder fails, or is its last.
 *
 *   FAIL_IO_UNDER   files below this folder count, no others
 *   FAIL_IO_CALLS   write: open for writing, write, fsync, ftruncate, rename, close of a written file;  read: read, pread
 *   FAIL_IO_AT      the number of the call, from 1; 0: none, only count
 *   FAIL_IO_HOW     ENOSPC: it fails so, and every later call that needs space;  EIO: it fails once;
 *                   SHORT: half of it is written, then as ENOSPC;  KILL: SIGKILL in place of the call;
 *                   TOUCH: FAIL_IO_TOUCH is written again in place of the call, which then goes on
 *   FAIL_IO_REPORT  file that receives the number of calls
 *
 * FAIL_IO_LATE alone: seconds by which a sentence of ours reaches stderr late, whatever signals come.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum How { kNoSpace, kBroken, kShort, kKill, kTouch };
enum Verdict { kGoOn, kFail, kHalf };

static const char* under;
static size_t under_size;
static int writes, at = -1;
static enum How how;
static atomic_int n_calls;
static atomic_bool full; /* the disk, from the failed call on */

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int fputs(const char* text, FILE* file) {
  const char* late = file == stderr && strncmp(text, "kvreplay: ", 10) == 0 ? getenv("FAIL_IO_LATE") : NULL;
  for (unsigned left = late == NULL ? 0 : (unsigned)atoi(late); left > 0;) {
    left = sleep(left);
  }
  return REAL(fputs)(text, file);
}

__attribute__((constructor)) static void begin(void) {
  const char* text = getenv("FAIL_IO_UNDER");
  if (text == NULL || getenv("FAIL_IO_AT") == NULL) {
    return;
  }
  under = strdup(text);
  under_size = strlen(under);
  writes = strcmp(getenv("FAIL_IO_CALLS"), "write") == 0;
  const char* name = getenv("FAIL_IO_HOW");
  how = name == NULL                   ? kBroken
        : strcmp(name, "ENOSPC") == 0  ? kNoSpace
        : strcmp(name, "SHORT") == 0   ? kShort
        : strcmp(name, "KILL") == 0    ? kKill
        : strcmp(name, "TOUCH") == 0   ? kTouch
                                       : kBroken;
  at = atoi(getenv("FAIL_IO_AT"));
}

__attribute__((destructor)) static void end(void) {
  const char* report = getenv("FAIL_IO_REPORT");
  if (at < 0 || report == NULL) {
    return;
  }
  at = -1;
  FILE* out = fopen(report, "w");
  if (out != NULL) {
    fprintf(out, "%d\n", atomic_load(&n_calls));
    fclose(out);
  }
}

static int below(const char* path) {
  char whole[4096];
  if (path[0] != '/') {
    if (getcwd(whole, sizeof whole / 2) == NULL) {
      return 0;
    }
    strcat(whole, "/");
    strncat(whole, path, sizeof whole / 2 - 1);
    path = whole;
  }
  return strncmp(path, under, under_size) == 0;
}

/* A regular file below the folder; for writes, one that is open for writing. */
static int counts(int fd) {
  char link[64], path[4096];
  if (at < 0) {
    return 0;
  }
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t n = readlink(link, path, sizeof path - 1);
  if (n <= 0) {
    return 0;
  }
  path[n] = '\0';
  return path[0] == '/' && below(path);
}

static int writable(int fd) {
  const int flags = fcntl(fd, F_GETFL);
  return flags >= 0 && (flags & O_ACCMODE) != O_RDONLY;
}

static void touch(void) {
  const char* path = getenv("FAIL_IO_TOUCH");
  struct timespec times[2] = {{0, UTIME_NOW}, {0, UTIME_NOW}};
  if (path != NULL) {
    utimensat(AT_FDCWD, path, times, 0);
  }
}

/* What becomes of a call. `space`: it needs room on the disk. */
static enum Verdict judge(int is_write, int space) {
  if (is_write != writes) {
    return kGoOn;
  }
  const int n = atomic_fetch_add(&n_calls, 1) + 1;
  if (n == at) {
    if (how == kKill) {
      kill(getpid(), SIGKILL);
      pause();
    }
    if (how == kTouch) {
      touch();
      return kGoOn;
    }
    if (how == kBroken) {
      errno = EIO;
      return kFail;
    }
    atomic_store(&full, 1);
    errno = ENOSPC;
    return how == kShort && space ? kHalf : kFail;
  }
  if (atomic_load(&full) && space) {
    errno = ENOSPC;
    return kFail;
  }
  return kGoOn;
}

#define WRITE(name, parameters, arguments, fd, size)                    \
  ssize_t name parameters {                                             \
    const enum Verdict verdict = counts(fd) ? judge(1, 1) : kGoOn;      \
    if (verdict == kFail) {                                             \
      return -1;                                                        \
    }                                                                   \
    if (verdict == kHalf) {                                             \
      size = (size + 1) / 2;                                            \
    }                                                                   \
    return REAL(name) arguments;                                        \
  }
#define READ(name, parameters, arguments, fd)              \
  ssize_t name parameters {                                \
    if (counts(fd) && judge(0, 0) != kGoOn) {              \
      return -1;                                           \
    }                                                      \
    return REAL(name) arguments;                           \
  }
/* Calls that return 0 or -1. */
#define CALL(name, parameters, arguments, fd, space)         \
  int name parameters {                                      \
    if (counts(fd) && judge(1, space) != kGoOn) {            \
      return -1;                                             \
    }                                                        \
    return REAL(name) arguments;                             \
  }

WRITE(write, (int fd, const void* data, size_t size), (fd, data, size), fd, size)
WRITE(pwrite, (int fd, const void* data, size_t size, off_t offset), (fd, data, size, offset), fd, size)
WRITE(pwrite64, (int fd, const void* data, size_t size, off64_t offset), (fd, data, size, offset), fd, size)
WRITE(writev, (int fd, const struct iovec* parts, int n), (fd, parts, n), fd, n)
READ(read, (int fd, void* data, size_t size), (fd, data, size), fd)
READ(pread, (int fd, void* data, size_t size, off_t offset), (fd, data, size, offset), fd)
READ(pread64, (int fd, void* data, size_t size, off64_t offset), (fd, data, size, offset), fd)
READ(readv, (int fd, const struct iovec* parts, int n), (fd, parts, n), fd)
CALL(fsync, (int fd), (fd), fd, 0)
CALL(fdatasync, (int fd), (fd), fd, 0)
CALL(ftruncate, (int fd, off_t size), (fd, size), fd, 1)
CALL(ftruncate64, (int fd, off64_t size), (fd, size), fd, 1)

/* A close that fails has closed the file all the same. */
int close(int fd) {
  const int fails = counts(fd) && writable(fd) && judge(1, 0) != kGoOn;
  const int reason = errno;
  const int done = REAL(close)(fd);
  if (fails) {
    errno = reason;
    return -1;
  }
  return done;
}

int rename(const char* from, const char* to) {
  return at >= 0 && below(to) && judge(1, 0) != kGoOn ? -1 : REAL(rename)(from, to);
}

static int opens(const char* path, int flags) {
  return at >= 0 && (flags & O_ACCMODE) != O_RDONLY && below(path) && judge(1, flags & O_CREAT) != kGoOn;
}

#define OPEN(name)                                                     \
  int name(const char* path, int flags, ...) {                         \
    va_list more;                                                      \
    va_start(more, flags);                                             \
    const mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;    \
    va_end(more);                                                      \
    return opens(path, flags) ? -1 : REAL(name)(path, flags, mode);    \
  }
OPEN(open)
OPEN(open64)
