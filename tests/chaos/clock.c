/* A wall clock that jumps, for every process that has this library in LD_PRELOAD, whatever language it is written in.

   It is off by as many seconds as the file named by CHAOS_CLOCK holds (a float64); the monotonic clock stays. Absolute
   deadlines by the wall clock are handed to the kernel, which knows the true one alone, without that offset. Compiled
   without headers: a fresh machine may have none. */

typedef struct { long s, ns; } Spec;  /* struct timespec; struct timeval has microseconds in the second */

extern void *dlsym(void *, const char *), *dlvsym(void *, const char *, const char *);
extern char *getenv(const char *);
extern int open(const char *, int, ...), close(int);
extern void *mmap(void *, unsigned long, int, int, int, long);

#define NEXT ((void *)-1)
#define BILLION 1000000000L
enum { REALTIME = 0, REALTIME_COARSE = 5, FUTEX_WAIT_BITSET = 9, FUTEX_CLOCK_REALTIME = 256, SYS_FUTEX = 202 };

static const volatile double none = 0.0, *offset;

static long nanoseconds(void)
{
    if (!offset) {
        const char *path = getenv("CHAOS_CLOCK");
        int file = path ? open(path, 0) : -1;
        void *map = file < 0 ? (void *)-1 : mmap(0, 8, 1, 1, file, 0);
        if (file >= 0) close(file);
        offset = map == (void *)-1 ? &none : map;
    }
    return (long)(*offset * 1e9);
}

static void add(Spec *t, long ns)
{
    long sum = t->ns + ns % BILLION;
    t->s += ns / BILLION + (sum >= BILLION) - (sum < 0);
    t->ns = sum >= BILLION ? sum - BILLION : sum < 0 ? sum + BILLION : sum;
}

/* A deadline of over 10^9 s is by the wall clock: no machine has been up for 31 years. */
static const Spec *true_deadline(const Spec *t, Spec *own)
{
    if (!t || t->s < BILLION) return t;
    *own = *t;
    add(own, -nanoseconds());
    return own;
}

int clock_gettime(int clock, Spec *t)
{
    static int (*real)(int, Spec *);
    if (!real) real = dlsym(NEXT, "clock_gettime");
    int status = real(clock, t);
    if (!status && (clock == REALTIME || clock == REALTIME_COARSE)) add(t, nanoseconds());
    return status;
}

int gettimeofday(Spec *t, void *zone)
{
    Spec now;
    clock_gettime(REALTIME, &now);
    t->s = now.s;
    t->ns = now.ns / 1000;
    return 0;
}

long time(long *where)
{
    Spec now;
    clock_gettime(REALTIME, &now);
    if (where) *where = now.s;
    return now.s;
}

int timespec_get(Spec *t, int base) { return base == 1 && !clock_gettime(REALTIME, t) ? base : 0; }

int pthread_cond_timedwait(void *condition, void *mutex, const Spec *t)
{
    static int (*real)(void *, void *, const Spec *);
    Spec own;
    if (!real) real = dlvsym(NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    return real(condition, mutex, true_deadline(t, &own));
}

int pthread_cond_clockwait(void *condition, void *mutex, int clock, const Spec *t)
{
    static int (*real)(void *, void *, int, const Spec *);
    Spec own;
    if (!real) real = dlsym(NEXT, "pthread_cond_clockwait");
    return real(condition, mutex, clock, true_deadline(t, &own));
}

int pthread_mutex_timedlock(void *mutex, const Spec *t)
{
    static int (*real)(void *, const Spec *);
    Spec own;
    if (!real) real = dlsym(NEXT, "pthread_mutex_timedlock");
    return real(mutex, true_deadline(t, &own));
}

int sem_timedwait(void *semaphore, const Spec *t)
{
    static int (*real)(void *, const Spec *);
    Spec own;
    if (!real) real = dlsym(NEXT, "sem_timedwait");
    return real(semaphore, true_deadline(t, &own));
}

long syscall(long number, long a, long b, long c, long d, long e, long f)
{
    static long (*real)(long, long, long, long, long, long, long);
    Spec own;
    if (!real) real = dlsym(NEXT, "syscall");
    if (number == SYS_FUTEX && (b & FUTEX_CLOCK_REALTIME) && (b & 127) == FUTEX_WAIT_BITSET)
        d = (long)true_deadline((const Spec *)d, &own);
    return real(number, a, b, c, d, e, f);
}
