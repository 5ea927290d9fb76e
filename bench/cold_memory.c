/* How long memory stays in this machine's caches while the process sleeps: nanoseconds of CPU to read one cache line,
 * each of which says where the next one is (so that no two reads overlap, and no hardware foresees them).
 *
 *     cold_memory KIB SLEEP_US ROUNDS      one line: the median over the rounds
 *     cold_memory 0 SLEEP_US ROUNDS        arithmetic that touches no memory instead, per thousand steps: the control
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { LINE = 64, STEPS = 60000 };

static volatile uint64_t sink;

static double cpu_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* One cycle through all lines in random order; the first word of each is the number of the next. */
static uint32_t *shuffled(size_t lines) {
    uint32_t *memory = aligned_alloc(4096, (lines * LINE + 4095) / 4096 * 4096), *order = malloc(lines * sizeof *order);
    if (!memory || !order) exit(1);
    for (size_t i = 0; i < lines; i++) order[i] = i;
    srand(1);
    for (size_t i = lines - 1; i > 0; i--) {
        size_t j = rand() % (i + 1);
        uint32_t swapped = order[i];
        order[i] = order[j];
        order[j] = swapped;
    }
    for (size_t i = 0; i < lines; i++) memory[order[i] * (LINE / 4)] = order[(i + 1) % lines];
    free(order);
    return memory;
}

int main(int count, char **args) {
    if (count != 4) return 2;
    size_t lines = atol(args[1]) * 1024 / LINE;
    long sleep_us = atol(args[2]), rounds = atol(args[3]);
    struct timespec pause = {sleep_us / 1000000, sleep_us % 1000000 * 1000};
    uint32_t *memory = lines ? shuffled(lines) : NULL;
    double *spent = malloc(rounds * sizeof *spent);
    if (rounds < 1 || !spent) return 2;
    for (long round = -3; round < rounds; round++) { /* the first ones fill the caches */
        if (sleep_us) nanosleep(&pause, NULL);
        double began = cpu_ns();
        uint64_t at = 1;
        if (lines) {
            at = 0;
            for (size_t i = 0; i < lines; i++) at = memory[at * (LINE / 4)];
        } else {
            for (int i = 0; i < STEPS; i++) at = at * 6364136223846793005u + 1442695040888963407u;
        }
        sink = at;
        if (round >= 0) spent[round] = (cpu_ns() - began) / (lines ? lines : STEPS / 1000);
    }
    qsort(spent, rounds, sizeof *spent, by_value);
    printf("%.1f\n", spent[rounds / 2]);
    return 0;
}
