#include "team.h"

#include <pthread.h>
#include <sched.h>

#include <cstdlib>

namespace whispers {
namespace {

inline void pause() {
#if defined(WHISPERS_X86)
  __builtin_ia32_pause();
#endif
}

// A pause takes 10 to 20 ns. A worker spins for about 50 us, longer than Python needs between two operations of a layer, and then sleeps;
// who waits at a barrier gives its core away after as long, in case it is one that the others need.
constexpr int kSpins = 4000;

std::mutex g_making;
Team* g_team = nullptr;  // never destroyed: its threads may sleep until the process ends

void* grown(void* old, int64_t bytes) {
  std::free(old);
  return std::aligned_alloc(kLine, (bytes + kLine - 1) / kLine * kLine);
}

int default_threads() {
  unsigned found = std::thread::hardware_concurrency();
  return found == 0 ? 1 : static_cast<int>(found);
}

}  // namespace

Team::Team(int threads) { start(threads); }

Team::~Team() {
  stop();
  for (void* memory : own_) std::free(memory);
  std::free(shared_);
}

void Team::start(int threads) {
  size_ = threads < 1 ? 1 : threads;
  stopping_ = false;
  own_.resize(size_, nullptr);
  for (int thread = 1; thread < size_; ++thread) workers_.emplace_back(&Team::work, this, thread);
}

void Team::stop() {
  {
    std::lock_guard<std::mutex> guard(sleep_);
    stopping_ = true;
    generation_.fetch_add(1);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
}

bool Team::reserve(int64_t each, int64_t shared) {
  if (each > own_bytes_) {
    own_bytes_ = 0;  // in case the next line fails half way
    for (void*& memory : own_) {
      memory = grown(memory, each);
      if (memory == nullptr) return false;
    }
    own_bytes_ = each;
  }
  if (shared > shared_bytes_) {
    shared_bytes_ = 0;
    shared_ = grown(shared_, shared);
    if (shared_ == nullptr) return false;
    shared_bytes_ = shared;
  }
  return true;
}

void Team::run(Body body, void* context, bool alone) {
  const int threads = alone ? 1 : size_;
  ticket_.store(0, std::memory_order_relaxed);
  if (threads > 1) {
    body_ = body;
    context_ = context;
    generation_.fetch_add(1);  // sequentially consistent, as is `sleepers_`: either we see a sleeper or it sees the generation
    if (sleepers_.load() > 0) {
      { std::lock_guard<std::mutex> guard(sleep_); }
      wake_.notify_all();
    }
  }
  body(context, Crew{*this, 0, threads});
  meet(threads);
}

void Team::meet(int threads) {
  if (threads == 1) {
    ticket_.store(0, std::memory_order_relaxed);
    return;
  }
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
    arrived_.store(0, std::memory_order_relaxed);
    ticket_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
    if (spins < kSpins) {
      pause();
    } else {
      sched_yield();
    }
  }
}

void Team::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    for (int spins = 0; generation_.load(std::memory_order_acquire) == seen && spins < kSpins; ++spins) pause();
    if (generation_.load(std::memory_order_acquire) == seen) {
      std::unique_lock<std::mutex> lock(sleep_);
      sleepers_.fetch_add(1);
      wake_.wait(lock, [&] { return generation_.load() != seen; });
      sleepers_.fetch_sub(1);
    }
    ++seen;
    if (stopping_) return;
    body_(context_, Crew{*this, thread, size_});
    meet(size_);
  }
}

Team& Team::instance() {
  std::lock_guard<std::mutex> guard(g_making);
  if (g_team == nullptr) {
    static bool registered = false;
    if (!registered) {
      // A child has the memory of its parent's threads, not the threads: it makes a team of its own.
      pthread_atfork([] { g_making.lock(); }, [] { g_making.unlock(); },
                     [] {
                       g_team = nullptr;
                       g_making.unlock();
                     });
      registered = true;
    }
    g_team = new Team(default_threads());
  }
  return *g_team;
}

void Team::resize(int threads) {
  Turn turn;
  Team& team = turn.team;
  if (threads == team.size_) return;
  team.stop();
  for (void*& memory : team.own_) {
    std::free(memory);
    memory = nullptr;
  }
  team.own_bytes_ = 0;
  // New workers count generations from 0.
  team.generation_.store(0);
  team.start(threads);
}

}  // namespace whispers
