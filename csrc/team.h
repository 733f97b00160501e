// The threads of this process that compute together.
//
// A body runs on all threads at once (`run`) and gets a `Crew`. Inside it phases are told apart by `barrier`; within a phase, `take` hands
// out tasks, or each thread computes its share. So a whole forward can be one `run` with a barrier where threads must meet. One body at
// a time: hold a `Turn`.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "types.h"

namespace whispers {

class Team;

// One of the threads that run a body, as that body sees it.
struct Crew {
  Team& team;
  int thread, threads;

  // The next task of this phase: 0, 1, 2, ... over all threads.
  int64_t take() const;
  // Waits for all threads. What each wrote before it, all see after it; `take` begins at 0 again.
  void barrier() const;
  // Memory of this thread, and of all together, aligned to 64 bytes: as much as was reserved.
  void* own() const;
  void* shared() const;
};

class Team {
 public:
  using Body = void (*)(void* context, const Crew& crew);

  explicit Team(int threads);  // or as many as the system starts
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Makes room, before `run`: so many bytes for each thread, and so many for all together. Kept and grown, never given back: after the
  // first steps no call allocates. False where there is no memory.
  bool reserve(int64_t each, int64_t shared);

  // Runs the body once on every thread, the caller being thread 0, and returns when all are through; `alone`, on the caller only, which
  // is faster for what takes a few microseconds.
  void run(Body body, void* context, bool alone = false);

  // The process's team, made when first asked for (and again in a child after fork, whose threads are gone, of as many).
  static Team& instance();
  static void resize(int threads);

 private:
  void work(int thread);
  void stop();
  void start(int threads);

  void meet(int threads);

  friend class Turn;
  friend struct Crew;
  int size_ = 1;
  std::vector<std::thread> workers_;
  std::vector<void*> own_;
  void* shared_ = nullptr;
  int64_t own_bytes_ = 0, shared_bytes_ = 0;
  std::mutex turn_;

  Body body_ = nullptr;
  void* context_ = nullptr;
  bool stopping_ = false;
  std::mutex sleep_;
  std::condition_variable wake_;
  // Each on a line of its own: a waiting thread reads one of them all the time.
  alignas(kLine) std::atomic<uint32_t> generation_{0};  // of bodies
  alignas(kLine) std::atomic<uint32_t> phase_{0};
  alignas(kLine) std::atomic<int> arrived_{0};
  alignas(kLine) std::atomic<int> sleepers_{0};
  alignas(kLine) std::atomic<int64_t> ticket_{0};
};

inline int64_t Crew::take() const { return team.ticket_.fetch_add(1, std::memory_order_relaxed); }
inline void Crew::barrier() const { team.meet(threads); }
inline void* Crew::own() const { return team.own_[thread]; }
inline void* Crew::shared() const { return team.shared_; }

// While it lives, the team is the holder's: a second caller waits.
class Turn {
 public:
  Turn() : team(Team::instance()), lock_(team.turn_) {}
  Team& team;

 private:
  std::unique_lock<std::mutex> lock_;
};

}  // namespace whispers
