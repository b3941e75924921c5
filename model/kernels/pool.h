// The threads of the kernels. Unlike OpenMP's, none waits at a barrier: work is taken in pieces, the caller takes
// whatever is left, and a thread that finds nothing spins for a moment and sleeps. Beside two busy processes OpenMP's
// barriers made a step 9 to 13 times as long on two cores.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>

class Pool {
 public:
  static Pool& shared() {
    static Pool& pool = *new Pool;  // never destroyed: its threads may outlive main()
    return pool;
  }

  // The caller counts as one. To be called before the first `run`, or by its thread.
  void resize(int64_t threads) {
    const std::lock_guard held(busy);
    for (; started < threads - 1; started++) std::thread(&Pool::work, this, started).detach();
    helpers = std::max<int64_t>(threads - 1, 0);
  }

  // Calls `piece(begin, end)` until all of [0, count) is done; pieces shrink to `grain`. count is below 2^20.
  template <typename Piece>
  void run(int64_t count, int64_t grain, const Piece& piece) {
    const std::unique_lock held(busy, std::try_to_lock);
    if (!held || !helpers || count <= grain || Clock::now() < alone_until) return piece(0, count);
    call.store([](const void* it, int64_t begin, int64_t end) { (*static_cast<const Piece*>(it))(begin, end); }, kRelaxed);
    what.store(&piece, kRelaxed), least.store(grain, kRelaxed), left.store(count, kRelaxed);
    const uint64_t job = ((cursor.load(kRelaxed) >> kJob) + 1) << kJob | static_cast<uint64_t>(count) << kEnd;
    cursor.store(job, std::memory_order_release);
    cursor.notify_all();
    take(job >> kJob);
    await();
  }

 private:
  using Call = void (*)(const void*, int64_t, int64_t);
  using Clock = std::chrono::steady_clock;
  static constexpr auto kRelaxed = std::memory_order_relaxed;
  static constexpr int kEnd = 20, kJob = 40;  // the cursor: a job's number, its end, the first index not taken
  static constexpr int kSpins = 2000;         // 50 us: a step's regions are 20 us apart, and waking a thread takes as long
  static constexpr auto kLate = std::chrono::milliseconds(1);  // a helper that takes so much longer has lost its core:
  static constexpr int kAlone = 50;  // the caller goes on alone for so many times as long

  void work(int64_t index) {
    for (uint64_t seen = 0;;) {
      seen = next(seen);
      if (index < helpers.load(kRelaxed)) take(seen);
    }
  }

  // The number of a job that is not the one seen last.
  uint64_t next(uint64_t seen) {
    for (int spin = 0;; spin++) {
      const uint64_t now = cursor.load(std::memory_order_acquire);
      if (now >> kJob != seen) return now >> kJob;
      spin < kSpins ? _mm_pause() : cursor.wait(now);
    }
  }

  // Takes pieces of this job until none is left. A thread that comes too late fails to exchange the cursor.
  void take(uint64_t job) {
    constexpr uint64_t kMask = (1 << kEnd) - 1;
    for (uint64_t at = cursor.load(std::memory_order_acquire); at >> kJob == job;) {
      const int64_t begin = at & kMask, rest = (at >> kEnd & kMask) - begin;
      if (!rest) return;
      const int64_t size = std::min(rest, std::max(least.load(kRelaxed), rest / (2 * (helpers.load(kRelaxed) + 1))));
      const Call here = call.load(kRelaxed);
      const void* it = what.load(kRelaxed);
      if (!cursor.compare_exchange_weak(at, at + size, std::memory_order_acq_rel)) continue;
      here(it, begin, begin + size);
      if (left.fetch_sub(size, std::memory_order_acq_rel) == size) left.notify_one();
      at = cursor.load(std::memory_order_acquire);
    }
  }

  // Until the pieces that others took are done.
  void await() {
    for (int spin = 0; spin < kSpins; spin++, _mm_pause())
      if (!left.load(std::memory_order_acquire)) return;
    const auto begin = Clock::now();
    for (int64_t now; (now = left.load(std::memory_order_acquire));) left.wait(now);
    if (const auto end = Clock::now(); end - begin > kLate) alone_until = end + kAlone * (end - begin);
  }

  std::mutex busy;  // one job at a time: a caller that finds another at work computes alone
  int64_t started = 0;
  std::atomic<int64_t> helpers = 0;
  std::atomic<uint64_t> cursor = 0;
  std::atomic<int64_t> left = 0, least = 1;
  std::atomic<const void*> what = nullptr;
  std::atomic<Call> call = nullptr;
  Clock::time_point alone_until;
};
