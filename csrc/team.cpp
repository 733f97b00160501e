#include "team.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <exception>

namespace whispers {
namespace {

inline void pause() {
#if defined(WHISPERS_X86)
  __builtin_ia32_pause();
#endif
}

// Waits until `done()`. First by spinning (a pause takes 10 to 60 ns), since most waits last a microsecond; then by giving the core away again
// and again, in case the thread that is waited for needs this one: on a busy machine two threads may share a core for long. After `patience`
// returns false; 0: never.
constexpr int kSpins = 100;

template <class Done>
bool wait_until(Done done, std::chrono::microseconds patience) {
  for (int spins = 0; spins < kSpins; ++spins) {
    if (done()) return true;
    pause();
  }
  const auto begin = std::chrono::steady_clock::now();
  while (!done()) {
    if (patience.count() > 0 && std::chrono::steady_clock::now() - begin > patience) return false;
    sched_yield();
  }
  return true;
}

// A worker waits so long for the next body before it sleeps: waking it takes 50 us, what a model does between two operations less than this.
constexpr std::chrono::microseconds kAwake{200};

std::mutex g_making;
Team* g_team = nullptr;  // never destroyed: its threads may sleep until the process ends
std::atomic<int> g_threads{0};  // what was asked for last, for the team of a child; 0: nothing was

void* grown(void* old, int64_t bytes) {
  std::free(old);
  return std::aligned_alloc(kLine, (bytes + kLine - 1) / kLine * kLine);
}

int threads_of_a_new_team() {
  if (g_threads.load() > 0) return g_threads.load();
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
  stopping_ = false;
  try {
    own_.reserve(threads < 1 ? 1 : threads);
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back(&Team::work, this, thread);
  } catch (const std::exception&) {
    // The system starts no more, or has no memory for them: the team is those that it did start. Who calls from C knows no exceptions.
  }
  // Workers look at these once a body runs.
  size_ = static_cast<int>(workers_.size()) + 1;
  own_.resize(size_, nullptr);
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
  wait_until([&] { return phase_.load(std::memory_order_acquire) != phase; }, std::chrono::microseconds{0});
}

void Team::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    if (!wait_until([&] { return generation_.load(std::memory_order_acquire) != seen; }, kAwake)) {
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
    g_team = new Team(threads_of_a_new_team());
  }
  return *g_team;
}

void Team::resize(int threads) {
  Turn turn;
  Team& team = turn.team;
  g_threads.store(threads);
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
